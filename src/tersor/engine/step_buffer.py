"""One step as one buffer of 32-bit numbers: what the host sends to the device before a forward, in one copy.

A step of up to R rows and T tokens, of texts of up to M pages, is six arrays side by side (`Layout`). A token that the
device has drawn and the host has not read yet is named by the place where the device keeps it: -1 - slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from tersor.engine.scheduler import Row
    from tersor.ops.attention_form import Rows


@dataclass(frozen=True, slots=True)
class Layout:
    """Where in the buffer of a step its arrays are.

    Attributes:
        tokens: T, room for tokens.
        rows: R, room for rows.
        pages: M, room for the pages of a text.
    """

    tokens: int
    rows: int
    pages: int

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> numbers of each array, in order."""
        return {
            "tokens": self.tokens,
            "starts": self.rows + 1,
            "lengths": self.rows,
            "places": self.rows,
            "slots": self.rows,
            "pages": self.rows * self.pages,
        }

    @property
    def size(self) -> int:
        """Numbers of the buffer."""
        return sum(self.sizes.values())

    def split(self, buffer: Any) -> dict[str, Any]:
        """Return name -> view of a buffer, an array or a tensor of `size` numbers; pages are [R, M]."""
        views, at = {}, 0
        for name, size in self.sizes.items():
            views[name] = buffer[at : at + size]
            at += size
        views["pages"] = views["pages"].reshape(self.rows, self.pages)
        return views


class PageTable:
    """The pages of the texts that run, as the host sends them: one line a slot.

    Attributes:
        lines: int32 [slots, M].
    """

    def __init__(self, slots: int, pages: int) -> None:
        self.lines: NDArray[np.int32] = np.zeros((slots, pages), dtype=np.int32)
        self._known: list[list[int] | None] = [None] * slots
        self._filled = [0] * slots

    def forget(self, slot: int) -> None:
        """Expect another text in a slot, or other pages of the same one."""
        self._filled[slot] = 0

    def update(self, slot: int, pages: Sequence[int]) -> None:
        """Write what has been added to the pages of a text since the last call."""
        filled = self._filled[slot]
        if filled < len(pages):
            self.lines[slot, filled : len(pages)] = pages[filled:]
            self._filled[slot] = len(pages)


def fill(
    buffer: NDArray[np.int32], layout: Layout, rows: Sequence[Row], slots: Sequence[int], table: PageTable, spare: int
) -> None:
    """Write a step into a buffer; what it has no row for is padding.

    Args:
        buffer: int32 [layout.size].
        layout: where its arrays are.
        rows: of the step.
        slots: of every row.
        table: up to date for those slots.
        spare: a slot that no request has, for padded rows.
    """
    views = layout.split(buffer)
    count = len(rows)
    views["lengths"][count:] = 0
    views["slots"][:count], views["slots"][count:] = slots, spare
    views["places"][count:] = 0
    views["pages"][:count] = table.lines[views["slots"][:count], : layout.pages]
    views["pages"][count:] = 0
    views["lengths"][:count] = [row.start + row.count for row in rows]
    if all(row.count == 1 for row in rows):
        views["tokens"][:count] = [
            token_of(row.request, row.start, slot) for row, slot in zip(rows, slots, strict=True)
        ]
        views["tokens"][count:] = 0
        views["starts"][:] = np.minimum(np.arange(layout.rows + 1), layout.tokens)
        views["places"][:count] = np.arange(count)
        return
    at = 0
    for index, (row, slot) in enumerate(zip(rows, slots, strict=True)):
        views["starts"][index] = at
        views["tokens"][at : at + row.count] = tokens_of(row.request, row.start, row.count, slot)
        at += row.count
        views["places"][index] = at - 1
    views["starts"][count:] = at
    views["tokens"][at:] = 0


def token_of(request: Any, position: int, slot: int) -> int:
    """Return a token of a request's text, or -1 - slot where only the device knows it."""
    behind = position - len(request.prompt)
    if behind < 0:
        return int(request.prompt[position])
    return int(request.output[behind]) if behind < len(request.output) else -1 - slot


def tokens_of(request: Any, start: int, count: int, slot: int) -> list[int]:
    """Return tokens of a request's text; only the last of them may be known to the device alone."""
    prompt = len(request.prompt)
    known = list(request.prompt[start : start + count])
    if len(known) < count:
        first = max(start - prompt, 0)
        known += request.output[first : start + count - prompt]
    if len(known) < count:
        known.append(-1 - slot)
    assert len(known) == count, "more than one token of a row has not been read"
    return known


def rows_on(views: dict[str, torch.Tensor], most_queries: int, most_length: int) -> Rows:
    """Return the rows of a step whose buffer is on the device."""
    from tersor.ops.attention_form import Rows

    return Rows(views["starts"], views["lengths"], views["pages"], most_queries, most_length)
