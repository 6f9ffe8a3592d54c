"""One step as one buffer of 32-bit numbers: what the host sends to the device before a forward, in one copy.

A step of up to R rows and T tokens, of texts of up to M pages, is six arrays side by side, and a seventh where rows
read pages together (`Layout`). A token that the device has drawn and the host has not read yet is named by the place
where the device keeps it: -1 - slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tersor.engine.request import prompt_targets
from tersor.engine.shared_pages import SharedPages, shared_size, write_nothing
from tersor.kernels.attention import FEW_QUERIES

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from tersor.engine.request import Row, Step
    from tersor.ops.attention_form import Rows


@dataclass(frozen=True, slots=True)
class Layout:
    """Where in the buffer of a step its arrays are.

    Attributes:
        tokens: T, room for tokens.
        rows: R, room for rows.
        pages: M, room for the pages of a text.
        shares: whether there is room for what rows read together.
    """

    tokens: int
    rows: int
    pages: int
    shares: bool = False

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
            "shared": shared_size(self.rows) if self.shares else 0,
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


def fill(
    buffer: NDArray[np.int32],
    layout: Layout,
    step: Step,
    lines: NDArray[np.int32],
    spare: int,
    shared: SharedPages | None = None,
) -> None:
    """Write a step into a buffer; what it has no row for is padding.

    `places` and `slots` are of the rows that draw: where in the step their last token is, and which slot gets the token
    drawn; padding draws from the first token into a spare slot.

    Args:
        buffer: int32 [layout.size].
        layout: where its arrays are.
        step: what is computed.
        lines: int32 [slots, M or more]: the pages of the text in every slot.
        spare: a slot that no request has.
        shared: what rows read together, where the layout has room for it.
    """
    views, rows, total, draws = layout.split(buffer), step.rows, step.tokens, len(step.drawing)
    count, decodes = len(rows), step.decodes
    prompts = rows[decodes:]
    slots = np.array([row.request.slot for row in rows], np.int32)
    counts = np.ones(count, np.int32)
    counts[decodes:] = [row.count for row in prompts]
    drawing = np.ones(count, np.bool_)
    drawing[decodes:] = [row.draws for row in prompts]
    ends = counts.cumsum(dtype=np.int32)
    views["starts"][0] = 0
    views["starts"][1 : count + 1] = ends
    views["starts"][count + 1 :] = total
    views["lengths"][:count] = [row.start for row in rows]
    views["lengths"][:count] += counts
    views["lengths"][count:] = 0
    views["pages"][:count] = lines[slots, : layout.pages]
    views["pages"][count:] = 0
    views["places"][:draws] = (ends - 1)[drawing]
    views["places"][draws:] = 0
    views["slots"][:draws] = slots[drawing]
    views["slots"][draws:] = spare
    if shared is not None:
        shared.write(views["shared"], layout.rows)
    elif layout.shares:
        write_nothing(views["shared"], layout.rows)
    views["tokens"][:decodes] = [_last_token(row) for row in rows[:decodes]]
    tokens: list[int] = []
    for row in prompts:
        tokens += tokens_of(row)
    views["tokens"][decodes:total] = tokens
    views["tokens"][total:] = 0


def _last_token(row: Row) -> int:
    """Return the token of a row that has one: most rows that decode have what the device drew a step ago."""
    request = row.request
    if row.start == len(request.prompt) + len(request.output):
        return -1 - request.slot
    (token,) = tokens_of(row)
    return token


def tokens_of(row: Row) -> Sequence[int]:
    """Return the tokens of a row; the last one may be known to the device alone."""
    request, end = row.request, row.start + row.count
    if end <= request.known:
        return request.tokens(row.start, end)
    assert end == request.known + 1, "a row is two tokens ahead of what the host has read"
    return [*request.tokens(row.start, end - 1), -1 - request.slot]


def most_tokens(step: Step) -> tuple[int, int]:
    """Return the most new tokens that a row of a step has, and those of rows of few, as `ops.Rows.most_few`."""
    counts = [row.count for row in step.rows]
    return max(counts), max((count for count in counts if count <= FEW_QUERIES), default=1)


def rows_on(views: dict[str, torch.Tensor], most_queries: int, most_few: int, most_length: int) -> Rows:
    """Return the rows of a step whose buffer is on the device, with what the host knows of them.

    They are settled: a copy has brought them, and pages hold what steps before this one wrote. A step's first kernel
    stands behind that copy, or is the first of a graph, so it starts when all before it has ended.
    """
    from tersor.ops.attention_form import Rows

    shared = views["shared"] if len(views["shared"]) else None
    return Rows(views["starts"], views["lengths"], views["pages"], most_queries, most_length, True, shared, most_few)


def prompt_places(step: Step) -> tuple[list[int], list[int], list[int]]:
    """Return where in a step tokens stand whose successor in a prompt has a log probability that is asked for.

    Returns:
        Places, the tokens that follow there, and how many of the most probable ones are asked for beside each.
    """
    places: list[int] = []
    targets: list[int] = []
    asks: list[int] = []
    if not step.prompt_logits:
        return places, targets, asks
    at = 0
    for row in step.rows:
        for target in prompt_targets(row):
            places.append(at + target - 1 - row.start)
            targets.append(row.request.prompt[target])
            asks.append(row.request.params.prompt_logprobs or 0)
        at += row.count
    return places, targets, asks
