"""Which part of a weight does each rank have, under each way to cut? Legal cuts, by the quanta of packed weights.

The arithmetic is that of `layouts.shard`, as loading has it (`models.share`): what is planned is what can be loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tersor.layouts.shard import Heads, Part, Span, cut, cut_heads, cut_rows
from tersor.planner.parts import WHOLE, Kind, Weight


@dataclass(frozen=True, slots=True)
class Piece:
    """What a rank has of a weight.

    Attributes:
        weight: the whole.
        part: its rows and columns.
        experts: which copies; `None` is all.
    """

    weight: Weight
    part: Part = WHOLE
    experts: Span | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(OC, IC) of a copy."""
        oc, ic = self.part.shape((self.weight.oc, self.weight.ic))
        return oc, ic

    @property
    def copies(self) -> int:
        """Experts of it that the rank has."""
        return self.weight.copies if self.experts is None else self.experts[1] - self.experts[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the piece."""
        return self.weight.nbytes(self.part, self.copies)


Pieces = tuple[Piece, ...]
"""What one rank has of a block."""


def whole(weights: tuple[Weight, ...], ranks: int) -> tuple[Pieces, ...]:
    """Return all of the weights on every rank."""
    return (tuple(map(Piece, weights)),) * ranks


def heads_of(kind: Kind, ranks: int) -> tuple[Heads, ...]:
    """Return the heads of every rank.

    Raises:
        ShapeError: there are too few, or their channels are no whole quanta of `out`.
    """
    what = kind.start.format(layer=kind.layers[0]) + kind.out.module
    return cut_heads(kind.heads, kind.kv_heads, kind.value_dim, ranks, kind.out.quantum, what=what)


def qkv_by_heads(kind: Kind, heads: tuple[Heads, ...]) -> tuple[Pieces, ...]:
    """Return the rows of queries, keys and values that belong to every rank's heads."""
    return tuple(
        tuple(map(Piece, kind.whole))
        + tuple(Piece(weight, _rows(kind, fields, own)) for weight, fields in zip(kind.qkv, kind.per_head, strict=True))
        for own in heads
    )


def _rows(kind: Kind, fields: tuple[tuple[str, int], ...], own: Heads) -> Part:
    spans, offset = [], 0
    for which, channels in fields:
        first, last = own.queries if which == "query" else own.keys
        spans.append((offset + first * channels, offset + last * channels))
        offset += channels * (kind.heads if which == "query" else kind.kv_heads)
    return Part(tuple(spans))


def out_by_heads(kind: Kind, heads: tuple[Heads, ...]) -> tuple[Pieces, ...]:
    """Return the columns of `out` that read every rank's heads."""
    width = kind.value_dim
    return tuple((Piece(kind.out, Part(columns=(own.queries[0] * width, own.queries[1] * width))),) for own in heads)


def by_rows(weight: Weight, ranks: int, what: str) -> tuple[Pieces, ...]:
    """Return rows of a weight: output channels, or tokens of a vocabulary.

    Raises:
        ShapeError: there are fewer rows than ranks.
    """
    return tuple((Piece(weight, Part((span,))),) for span in cut_rows(weight.oc, ranks, what=what))


def inner(channels: int, downs: tuple[Weight, ...], ranks: int, what: str) -> tuple[Span, ...]:
    """Return the inner channels of a feed-forward network that every rank has, in quanta of `downs`.

    Raises:
        ShapeError: there are fewer quanta than ranks.
    """
    return cut(channels, ranks, math.lcm(*(down.quantum for down in downs)), what=what)


def up_by_inner(
    gate_up: tuple[Weight, ...], channels: int, spans: tuple[Span, ...], interleaved: bool = False
) -> tuple[Pieces, ...]:
    """Return the rows of gate and up that make every rank's inner channels."""
    found = []
    for first, last in spans:
        pieces = []
        for weight in gate_up:
            rows: tuple[Span, ...] = ((first, last),)
            if interleaved:
                rows = ((2 * first, 2 * last),)
            elif weight.oc == 2 * channels:
                rows = ((first, last), (channels + first, channels + last))
            pieces.append(Piece(weight, Part(rows)))
        found.append(tuple(pieces))
    return tuple(found)


def down_by_inner(down: Weight, spans: tuple[Span, ...]) -> tuple[Pieces, ...]:
    """Return the columns of down that read every rank's inner channels."""
    return tuple((Piece(down, Part(columns=span)),) for span in spans)


def dealt(weights: tuple[Weight, ...], ranks: int, what: str) -> tuple[Pieces, ...]:
    """Return whole experts, dealt out to the ranks.

    Raises:
        ShapeError: there are fewer experts than ranks.
    """
    spans = cut(weights[0].copies, ranks, tile=1, what=what)
    return tuple(tuple(Piece(weight, WHOLE, span) for weight in weights) for span in spans)
