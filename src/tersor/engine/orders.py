"""What do the ranks of a model have to know of a step? Its sizes and its buffer, which the first rank sends to all.

The first rank alone has requests, a scheduler and a sampler. It tells the others what it launches, from host to host,
and they launch the same; tokens that are drawn reach them on the device, as part of the step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup

from tersor.engine.step_buffer import Layout
from tersor.ops.collective import Ranks


class Order(NamedTuple):
    """A step, by its sizes.

    Attributes:
        graph: rows of the captured step that serves it; 0 where none does.
        tokens, rows, pages: of its `Layout`; no tokens mean that there is no step any more.
        shares: whether rows read pages together, as in `Layout`: 0 or 1.
        draws: rows that draw.
        more: places of tokens whose logits are wanted beside, behind the step in its buffer.
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

    @property
    def size(self) -> int:
        """Numbers of the buffer."""
        return self.layout.size + self.more


END = Order(*[0] * len(Order._fields))
"""What the first rank says last."""
ROOM = 4096
"""Numbers of a step's buffer that travel with its sizes; what is more comes behind them."""
_HEAD = len(Order._fields)


class Line:
    """From the host of the first rank to those of the others."""

    def __init__(self, ranks: Ranks, group: ProcessGroup) -> None:
        """Take a process group of hosts.

        Args:
            ranks: who is connected.
            group: of gloo, whose calls may wait as long as nothing is to be computed.
        """
        self._ranks = ranks
        self._group: ProcessGroup | None = group
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
        self._ranks.from_first(self._message, self._group)
        if order.size > ROOM:
            self._ranks.from_first(buffer[ROOM:], self._group)

    def end(self) -> None:
        """Tell all ranks that there is no step any more.

        Raises:
            LostError: a rank is gone.
        """
        self._message[:_HEAD] = torch.tensor(END)
        self._ranks.from_first(self._message, self._group)

    def order(self) -> Order:
        """Wait for the next step and return its sizes.

        Raises:
            LostError: the first rank is gone.
        """
        self._ranks.from_first(self._message, self._group)
        return Order(*self._message[:_HEAD].tolist())

    def read(self, buffer: torch.Tensor) -> None:
        """Read the buffer of a step whose sizes are known, int32 [order.size].

        Raises:
            LostError: the first rank is gone.
        """
        near = buffer[:ROOM]
        near.copy_(self._message[_HEAD : _HEAD + len(near)])
        if len(buffer) > ROOM:
            self._ranks.from_first(buffer[ROOM:], self._group)

    def close(self) -> None:
        """Let go of the group, as `Ranks.close` does."""
        self._group = None
