"""How does a step go through the stages of a model? States to the next, and what the last one draws to the first.

Every stage is some ranks (`planner.placement`), all of which have the states that they leave behind; each rank of the
next stage is sent them by one of these. Nobody waits until what it sent is there: while a stage computes a step, the
one ahead computes the step after it. The two ways have groups of their own, since on a GPU what one group carries goes
one after the other, and two stages that each wait to send would wait for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from tersor.ops.collective import ALONE, Outbox, Ranks
from tersor.planner.placement import Placement

_OF_A_STEP = 16
"""Tensors that may come back of one step."""


class Stages:
    """The stages of a model, seen from a rank of one of them; a single one passes nothing on.

    Attributes:
        index, count: which one this is, and how many there are.
        everyone: the ranks of all stages: what they have to agree on.
    """

    def __init__(
        self,
        placement: Placement | None = None,
        rank: int = 0,
        everyone: Ranks = ALONE,
        onward: ProcessGroup | None = None,
        back: ProcessGroup | None = None,
    ) -> None:
        """Take what process groups connect.

        Args:
            placement: of the model; `None` is one stage.
            rank: which of all ranks this is.
            everyone: see the attributes.
            onward, back: of all ranks, for states and for what comes back; `None` with one stage.
        """
        self.everyone, self._groups = everyone, (onward, back)
        self.index, self.count = 0, 1
        self._onward = self._back = Outbox(0)
        if placement is None:
            return
        place = placement.place(rank)
        self.index, self.count = place.index, place.stages
        self._first_of_last = placement.members(place.stages - 1)[0]
        if not place.first:
            ahead = placement.members(place.index - 1)
            self._source = ahead[place.rank % len(ahead)]
        if not place.last:
            behind = placement.members(place.index + 1)
            self._targets = [one for number, one in enumerate(behind) if number % place.stage.ranks == place.rank]
            self._onward = Outbox(max(1, len(self._targets)) * (place.stages + 1))
        self._back = Outbox(_OF_A_STEP * (place.stages + 1))

    @property
    def first(self) -> bool:
        """Whether steps begin here."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether tokens are drawn here."""
        return self.index == self.count - 1

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the stage ahead passed on, in the memory of `x`, which is of its shape and dtype.

        Raises:
            LostError: a rank is gone.
        """
        self._call(lambda: distributed.recv(x, self._source, group=self._groups[0]))
        return x

    def pass_on(self, x: torch.Tensor) -> None:
        """Send the states of a step to the next stage; `x` is left alone afterwards.

        Raises:
            LostError: a rank is gone.
        """
        for target in self._targets:
            self._call(functools.partial(self._onward.send, x, target, self._groups[0]))

    def give_back(self, x: torch.Tensor) -> None:
        """Send a tensor from the first rank of the last stage to the first of all; `x` is left alone afterwards.

        Raises:
            LostError: a rank is gone.
        """
        self._call(lambda: self._back.send(x, 0, self._groups[1]))

    def get_back(self, x: torch.Tensor) -> torch.Tensor:
        """Return what was given back, on the first rank, in the memory of `x`, which is of its shape and dtype.

        Raises:
            LostError: a rank is gone.
        """
        self._call(lambda: distributed.recv(x, self._first_of_last, group=self._groups[1]))
        return x

    def greet(self, rank: int, device: torch.device) -> None:
        """Connect stages that pass something on, which takes long on GPUs; all ranks do so at once.

        Args:
            rank: which of all this is.
            device: of this rank.

        Raises:
            LostError: a rank is gone.
        """
        if self.count == 1:
            return
        word = torch.zeros(8, device=device)
        if not self.first:
            self.take(word)
        if not self.last:
            self.pass_on(word.clone())
        if rank == self._first_of_last:
            self.give_back(word.clone())
        if rank == 0:
            self.get_back(word)
        self.everyone.least(0, device)

    def close(self) -> None:
        """Let go of the groups, as `Ranks.close` does."""
        self._onward.close()
        self._back.close()
        self._groups = (None, None)
        self.everyone.close()

    def abort(self) -> None:
        """Have nobody wait for other stages on this rank's GPU any more; any thread may ask."""
        for group in self._groups:
            if group is not None:
                group.abort()

    def _call(self, call: Callable[[], object]) -> None:
        self.everyone.call(call)


ONE = Stages()
"""The stage of a model that has one."""
