"""What is a way to cut a block of a decoder, and which have its ends and any product? Those of layers: `layer_ways`.

A block reads and gives activations in a layout, a letter: R, every rank has all of it; S, every rank has some tokens; H
heads, I inner channels, C channels, V tokens of the vocabulary; P, every rank has an addend, and their sum is pending.
(Megatron-LM: arXiv 1909.08053; sequence parallel: arXiv 2205.05198; DTensor's Replicate, Shard and Partial.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from tersor.errors import ShapeError
from tersor.formats import Pruned
from tersor.layouts.shard import Span
from tersor.planner import cuts
from tersor.planner.cost import ZERO, Kernels, Timed
from tersor.planner.cuts import Piece, Pieces
from tersor.planner.links import Exchange, Links
from tersor.planner.mesh import Axes
from tersor.planner.parts import Model, Weight, Workload

_T = TypeVar("_T")
ALL, TOKENS, HEADS, INNER, CHANNELS, VOCABULARY, PENDING = "R", "S", "H", "I", "C", "V", "P"
REPLICATE, COLUMN, ROW, HEAD, SEQUENCE, BATCH = "replicate", "column", "row", "head", "sequence", "batch"
VOCAB, TENSOR, EXPERT = "vocabulary", "tensor", "expert"
DECODE, PREFILL = "decode", "prefill"
_PRUNED_START = 3e-6


@dataclass(frozen=True, eq=False)
class Way:
    """One way to cut a block, in one phase.

    Attributes:
        name: such as `column`.
        reads, gives: layouts.
        held: how weights are placed: phases must agree in it.
        pieces: of every rank of a stage.
        timed: seconds of the rank that takes longest.
        kv: bytes of keys and values of every rank.
        heads: of every rank where attention is cut by them: first query head and the one after its last.
    """

    name: str
    reads: str
    gives: str
    held: str
    pieces: tuple[Pieces, ...]
    timed: Timed
    kv: tuple[int, ...]
    heads: tuple[Span, ...] = ()

    @cached_property
    def weight_bytes(self) -> tuple[int, ...]:
        """Bytes of the weights of every rank."""
        return tuple(sum(piece.nbytes for piece in pieces) for pieces in self.pieces)

    @property
    def bytes(self) -> int:
        """Bytes of weights, keys and values of the rank that has most."""
        return max(weights + kv for weights, kv in zip(self.weight_bytes, self.kv, strict=True))


@dataclass(frozen=True, slots=True)
class Phase:
    """What a pass over the layers computes.

    Attributes:
        name: `decode` or `prefill`.
        tokens: of the pass.
        rows: texts they belong to; logits are made for one token of each.
        length: tokens of a text that the last one sees.
    """

    name: str
    tokens: int
    rows: int
    length: int

    @staticmethod
    def of(name: str, workload: Workload, parts: int) -> Phase:
        """Return a pass of a workload whose decode step is dealt out to so many micro-batches."""
        if name == DECODE:
            rows = -(-workload.batch // parts)
            return Phase(name, rows, rows, workload.context)
        return Phase(name, workload.prompt, 1, workload.prompt)


@dataclass(frozen=True)
class Setting:
    """What ways are made of: a model on axes, with prices; `served` ones are those that the engine runs."""

    model: Model
    axes: Axes
    workload: Workload
    kernels: Kernels
    links: Links
    served: bool = False

    @property
    def ranks(self) -> int:
        """Of a stage."""
        return self.axes.tensor

    def exchange(self, operation: str, nbytes: int) -> Exchange:
        """Return what an operation of a tensor group takes."""
        return self.links.exchange(operation, nbytes, self.axes.tensor_group)

    def product(self, pieces: Pieces, tokens: int) -> Timed:
        """Return what a rank's products of these weights take; those that read the same are one launch."""
        found, sets = ZERO, dict[int, dict[object, int]]()
        for piece in pieces:
            ic = piece.shape[1]
            if isinstance(piece.weight.form, Pruned):
                found += self._pruned(piece, tokens)
                continue
            own = sets.setdefault(ic, {})
            for scheme, rows in piece.weight.levels(piece.part):
                own[scheme] = own.get(scheme, 0) + rows
        for ic, levels in sets.items():
            found += self.kernels.product(tuple(levels.items()), ic, tokens)  # type: ignore[arg-type]
        return found

    def _pruned(self, piece: Piece, tokens: int) -> Timed:
        oc, ic = piece.shape
        kernels = self.kernels
        seconds = max(piece.nbytes / kernels.bandwidth, 2 * oc * ic * tokens / (kernels.chip.fp16_ops * 0.5))
        return Timed(seconds + _PRUNED_START, f"roofline of a pruned [{oc}, {ic}] x {tokens} tokens")

    def longest(self, pieces: tuple[Pieces, ...], tokens: int) -> Timed:
        """Return what the product takes of the rank that takes longest."""
        return max((self.product(own, tokens) for own in dict.fromkeys(pieces)), key=lambda timed: timed.seconds)


def embedding(setting: Setting, phase: Phase) -> list[Way]:
    """Return the ways of the embedding."""
    weight, ranks = setting.model.embedding, setting.ranks
    timed, none = setting.kernels.lookup(phase.tokens, weight.ic), (0,) * ranks
    found = [Way(REPLICATE, ALL, ALL, REPLICATE, cuts.whole((weight,), ranks), timed, none)]
    rows = legal(lambda: cuts.by_rows(weight, ranks, "the vocabulary")) if ranks > 1 else None
    if rows is not None:
        found.append(Way(VOCAB, ALL, PENDING, VOCAB, rows, timed, none))
    return found


def head(setting: Setting, phase: Phase) -> list[Way]:
    """Return the ways of the output head; it makes logits of the last token of every row."""
    weight, ranks = setting.model.out, setting.ranks
    rows = legal(lambda: cuts.by_rows(weight, ranks, "the vocabulary")) if ranks > 1 else None
    return [
        way for way in linear(setting, (weight,), phase.rows, (VOCAB, ALL, VOCABULARY, rows)) if way.name != SEQUENCE
    ]


def sample(setting: Setting, phase: Phase) -> list[Way]:
    """Return the one way to draw tokens: of whole logits, on the first rank, while others wait."""
    timed = setting.kernels.sample(phase.rows, setting.model.vocabulary)
    return [Way(REPLICATE, ALL, ALL, REPLICATE, ((),) * setting.ranks, timed, (0,) * setting.ranks)]


def norms(setting: Setting, tokens: int) -> list[Way]:
    """Return the ways of a norm."""
    hidden, ranks = setting.model.hidden, setting.ranks
    none: tuple[Pieces, ...] = ((),) * ranks
    found = [Way(REPLICATE, ALL, ALL, "", none, setting.kernels.norm(tokens, hidden), (0,) * ranks)]
    if 1 < ranks <= tokens:
        timed = setting.kernels.norm(-(-tokens // ranks), hidden)
        found.append(Way(SEQUENCE, TOKENS, TOKENS, "", none, timed, (0,) * ranks))
    return found


def linear(
    setting: Setting,
    weights: tuple[Weight, ...],
    tokens: int,
    cut: tuple[str, str, str, tuple[Pieces, ...] | None],
    columns: bool = False,
) -> list[Way]:
    """Return the ways of a product: all on every rank, tokens dealt out, the cut that is given, output channels."""
    ranks, none = setting.ranks, (0,) * setting.ranks
    every = cuts.whole(weights, ranks)
    found = [Way(REPLICATE, ALL, ALL, REPLICATE, every, setting.longest(every[:1], tokens), none)]
    if ranks == 1:
        return found
    if tokens >= ranks:
        timed = setting.longest(every[:1], -(-tokens // ranks))
        found.append(Way(SEQUENCE, TOKENS, TOKENS, REPLICATE, every, timed, none))
    name, reads, gives, pieces = cut
    if pieces is not None:
        found.append(Way(name, reads, gives, name, pieces, setting.longest(pieces, tokens), none))
    if columns:
        rows = legal(lambda: cuts.by_rows(weights[0], ranks, weights[0].module))
        if rows is not None:
            found.append(Way(COLUMN, ALL, CHANNELS, COLUMN, rows, setting.longest(rows, tokens), none))
    return found


def legal(make: Callable[[], _T]) -> _T | None:
    """Return what a cut gives, or `None` where no cut respects the quanta."""
    try:
        return make()
    except ShapeError:
        return None
