"""How do the ranks of one model exchange what each has computed? Sums, and the shares of all, on the current stream.

Each rank is a process with a device of its own. NCCL carries tensors of GPUs, and a CUDA graph may hold its calls; what
is small, `one_shot` adds up. gloo carries tensors of CPUs. All ranks get the same bits: a router that all of them have
chooses the same experts everywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup
from torch.nn import functional

from tersor.errors import LostError
from tersor.ops.one_shot import OneShot

_T = TypeVar("_T")
_NEWS = 2.0
"""Seconds until it is known which rank ended, after it cannot be reached."""


class Outbox:
    """Tensors on their way to other ranks: their memory is kept, and the sender waits for none but old ones."""

    def __init__(self, most: int) -> None:
        """Begin with nothing sent.

        Args:
            most: tensors that may be on their way.
        """
        self._most = most
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, x: torch.Tensor, target: int, group: ProcessGroup | None) -> None:
        """Begin to send a tensor, which is left alone afterwards.

        Raises:
            RuntimeError: the target cannot be reached.
        """
        while len(self._sent) >= self._most:
            self._sent.popleft()[0].wait()
        self._sent.append((torch.distributed.isend(x, target, group=group), x))

    def empty(self, seconds: float) -> None:
        """Wait until all have arrived.

        Raises:
            RuntimeError: one did not within so many seconds, or a target cannot be reached.
        """
        while self._sent:
            self._sent.popleft()[0].wait(timedelta(seconds=seconds))

    def close(self) -> None:
        """Forget what was sent."""
        self._sent.clear()


class Ranks:
    """The ranks of a model, seen from one of them; a single one exchanges nothing.

    Attributes:
        rank, count: which one this is, and how many there are.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        group: ProcessGroup | None = None,
        lost: Callable[[float], str] = lambda _: "",
        one_shot: OneShot | None = None,
    ) -> None:
        """Take what a process group connects.

        Args:
            rank, count: see the attributes.
            group: of the ranks' devices; `None` with one rank.
            lost: waits so many seconds at most for a rank to be gone and says in a line which is; empty if none is.
            one_shot: adds up what is small, instead of the group; `None` on CPUs, and where peers cannot be read.
        """
        self.rank, self.count, self._group, self._lost = rank, count, group, lost
        self._one_shot = one_shot

    @property
    def first(self) -> bool:
        """Whether this is the rank that adds what is added once: residuals and biases."""
        return self.rank == 0

    def once(self, x: _T) -> _T | None:
        """Return `x` on the first rank, and `None` on others: an addend of what `sum` adds up."""
        return x if self.first else None

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' `x`, in its memory.

        Raises:
            LostError: a rank is gone.
        """
        if self._one_shot is not None and self._one_shot.serves(x):
            return self._one_shot.sum(x)
        if self.count > 1:
            self.call(lambda: torch.distributed.all_reduce(x, group=self._group))
        return x

    def side_by_side(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """Return the columns of all ranks, one rank's behind the other's: [S, sum of widths].

        Args:
            x: [S, widths[rank]].
            widths: columns of every rank.

        Raises:
            LostError: a rank is gone.
        """
        if self.count == 1:
            return x
        most = max(widths)
        own = functional.pad(x, (0, most - x.shape[1])).contiguous()
        every = list(own.new_empty(self.count, *own.shape).unbind())
        self.call(lambda: torch.distributed.all_gather(every, own, group=self._group))
        return torch.cat([part[:, :width] for part, width in zip(every, widths, strict=True)], dim=1)

    def from_first(self, x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
        """Return the first rank's `x`, in the memory of each rank's own.

        Args:
            x: of one shape and dtype on all ranks.
            group: another one of the same ranks, such as that of their hosts.

        Raises:
            LostError: a rank is gone.
        """
        if self.count > 1:
            self.call(lambda: torch.distributed.broadcast(x, group=group or self._group, group_src=0))
        return x

    def least(self, number: int, device: torch.device) -> int:
        """Return the smallest of all ranks' numbers; the host waits for it.

        Raises:
            LostError: a rank is gone.
        """
        if self.count == 1:
            return number
        found = torch.tensor([number], device=device)
        self.call(lambda: torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group=self._group))
        return int(found)

    def check(self, seconds: float = 0) -> None:
        """Hold that all ranks are there: what a device was given while one ended means nothing.

        Args:
            seconds: to wait for news of one that is gone.

        Raises:
            LostError: a rank is gone.
        """
        line = self._lost(seconds)
        if line:
            raise LostError(line)

    def close(self) -> None:
        """Let go of the group: its threads end with it, and must not outlive the interpreter."""
        self._group, self._lost = None, lambda _: "the model is closed"

    def abort(self) -> None:
        """Have nobody wait for other ranks on this rank's GPU any more; any thread may ask."""
        if self._one_shot is not None:
            self._one_shot.stop()
        if self._group is not None:
            self._group.abort()

    def call(self, call: Callable[[], object]) -> None:
        """Make a call of torch.distributed; what it raises becomes one line.

        Raises:
            LostError: a rank is gone.
        """
        try:
            call()
        except RuntimeError as error:
            self.check(_NEWS)
            line = str(error).splitlines()[0]
            raise LostError(f"the ranks of the model cannot reach each other: {line}") from error


ALONE = Ranks()
"""One rank, which has the whole model."""


def disconnect(device: torch.device) -> None:
    """Let go of torch.distributed where ranks did not connect: whoever tries again begins anew.

    Args:
        device: of this rank.
    """
    if torch.distributed.is_initialized():
        world = torch.distributed.group.WORLD
        if device.type == "cuda" and world is not None:
            world.abort()  # else a rank that is gone is waited for
        torch.distributed.destroy_process_group()
