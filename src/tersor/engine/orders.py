"""What do the ranks of a model have to know of a step? Its sizes and its buffer, which the first rank sends to all.

The first rank alone has requests, a scheduler and a sampler. It tells the others what it launches, from host to host,
and they launch the same; tokens that are drawn reach them on the device, as part of the step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from tersor.engine.step_buffer import Layout
from tersor.ops.collective import Outbox, Ranks


class Order(NamedTuple):
    """A step, by its sizes.

    Attributes:
        graph: rows of the captured step that serves it; 0 where none does.
        tokens, rows, pages: of its `Layout`; no tokens mean that there is no step any more.
        shares: whether rows read pages together, as in `Layout`: 0 or 1.
        draws: rows that draw.
        more: places of tokens whose logits are wanted beside; behind the step in its buffer are these, the tokens that
            follow there, and how many of the most probable ones are asked for.
        embeds: places, among rows that draw, of those whose last states are wanted, behind that.
        news: numbers that the sampler of another rank has to know ahead of the step, behind that.
        logprobs: whether a row that draws asks for log probabilities: 0 or 1.
        kept: the last of the steps, counted from 1, whose tokens this one begins with (`returns`); 0 where there is
            none, and where steps have one stage.
        most_queries, most_few, most_length: tokens that a row has at most, those that a row of few has, as in
            `ops.Rows`, and those that a text can have.
    """

    graph: int
    tokens: int
    rows: int
    pages: int
    shares: int
    draws: int
    more: int
    embeds: int
    news: int
    logprobs: int
    kept: int
    most_queries: int
    most_few: int
    most_length: int

    @property
    def most(self) -> tuple[int, int, int]:
        """The last three, as `step_buffer.rows_on` takes them."""
        return self.most_queries, self.most_few, self.most_length

    @property
    def layout(self) -> Layout:
        """Where in the buffer the arrays of the step are."""
        return Layout(self.tokens, self.rows, self.pages, bool(self.shares))

    def split(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return name -> view of what is behind the step in its buffer: places, targets, asks, embeds and news."""
        sizes = [self.more] * 3 + [self.embeds, self.news]
        return dict(zip(_BEHIND, buffer[self.layout.size :].split(sizes), strict=True))

    @property
    def size(self) -> int:
        """Numbers of the buffer."""
        return self.layout.size + 3 * self.more + self.embeds + self.news


_BEHIND = ("places", "targets", "asks", "embeds", "news")
END = Order(*[0] * len(Order._fields))
"""What the first rank says last."""
ROOM = 4096
"""Numbers of a step's buffer that travel with its sizes; what is more comes behind them."""
_HEAD = len(Order._fields)
_PATIENCE = 10.0
"""Seconds that ranks of several stages have to finish their steps and hear that there are no more."""
_TOLD = 32
"""Messages that a rank may not have read yet."""


class Line:
    """From the host of the first rank to those of the others.

    Ranks of one stage read a step together. Those of several are told one by one, and the first waits for none of them:
    on a CPU a stage reads a step when it has computed the one before.
    """

    def __init__(self, ranks: Ranks, group: ProcessGroup, apart: bool = False) -> None:
        """Take a process group of hosts.

        Args:
            ranks: who is connected.
            group: of gloo, whose calls may wait as long as nothing is to be computed.
            apart: whether ranks are of several stages.
        """
        self._ranks, self._apart = ranks, apart
        self._group: ProcessGroup | None = group
        self._sent = Outbox(_TOLD * ranks.count)
        self._message = torch.zeros(_HEAD + ROOM, dtype=torch.int32)

    def tell(self, order: Order, buffer: torch.Tensor) -> None:
        """Send a step to all ranks.

        Args:
            order: its sizes.
            buffer: int32 [order.size], on the host.

        Raises:
            LostError: a rank is gone.
        """
        self._ranks.check()
        near = buffer[:ROOM]
        self._message[:_HEAD] = torch.tensor(order)
        self._message[_HEAD : _HEAD + len(near)] = near
        self._tell(self._message)
        if order.size > ROOM:
            self._tell(buffer[ROOM:])

    def end(self) -> None:
        """Tell all ranks that there is no step any more.

        Raises:
            LostError: a rank is gone.
        """
        self._message[:_HEAD] = torch.tensor(END)
        self._tell(self._message)
        self._ranks.call(lambda: self._sent.empty(_PATIENCE))

    def order(self) -> Order:
        """Wait for the next step and return its sizes.

        Raises:
            LostError: the first rank is gone.
        """
        self._hear(self._message)
        return Order(*self._message[:_HEAD].tolist())

    def read(self, buffer: torch.Tensor) -> None:
        """Read the buffer of a step whose sizes are known, int32 [order.size].

        Raises:
            LostError: the first rank is gone.
        """
        near = buffer[:ROOM]
        near.copy_(self._message[_HEAD : _HEAD + len(near)])
        if len(buffer) > ROOM:
            self._hear(buffer[ROOM:])

    def close(self) -> None:
        """Let go of the group, as `Ranks.close` does."""
        self._sent.close()
        self._group = None

    def _tell(self, message: torch.Tensor) -> None:
        if not self._apart:
            self._ranks.from_first(message, self._group)
            return
        own = message.clone()  # memory is kept until it is sent

        def send() -> None:
            for rank in range(1, self._ranks.count):
                self._sent.send(own, rank, self._group)

        self._ranks.call(send)

    def _hear(self, message: torch.Tensor) -> None:
        if not self._apart:
            self._ranks.from_first(message, self._group)
            return
        self._ranks.call(lambda: distributed.recv(message, 0, group=self._group))
