"""In which ways can each block of a decoder be cut, and what does each way take? Megatron's, and those beside them.

A block reads and gives activations in a layout, a letter: R, every rank has all of it; S, every rank has some tokens; H
heads, I inner channels, C channels, V tokens of the vocabulary; P, every rank has an addend, and their sum is pending.
(arXiv 1909.08053; sequence parallel: arXiv 2205.05198; DTensor's Replicate, Shard and Partial.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from tersor.errors import ShapeError
from tersor.formats import Pruned
from tersor.layouts.shard import Span
from tersor.planner import cuts
from tersor.planner.cost import ZERO, Kernels, Timed, busiest
from tersor.planner.cuts import Piece, Pieces
from tersor.planner.links import ALL_TO_ALL, Exchange, Links
from tersor.planner.mesh import Axes
from tersor.planner.parts import PLAIN_BYTES, Experts, Kind, Model, Weight, Workload

_T = TypeVar("_T")
ALL, TOKENS, HEADS, INNER, CHANNELS, VOCABULARY, PENDING = "R", "S", "H", "I", "C", "V", "P"
REPLICATE, COLUMN, ROW, HEAD, SEQUENCE = "replicate", "column", "row", "head", "sequence"
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


def of_layer(setting: Setting, kind: Kind, phase: Phase) -> Iterator[tuple[str, list[Way], int]]:
    """Yield the blocks of a layer in order: name, ways, and channels of what the block gives."""
    model, hidden = setting.model, setting.model.hidden
    yield "norm", _norms(setting, phase.tokens), hidden
    yield "qkv", _qkv(setting, kind, phase), _channels(kind)
    yield "attention", _attention(setting, kind, phase), kind.heads * kind.value_dim
    yield "out", _out(setting, kind, phase), hidden
    yield "ffn_norm", _norms(setting, phase.tokens), hidden
    if kind.experts is not None:
        yield "experts", _experts(setting, kind, kind.experts, phase), hidden
    elif kind.down is not None:
        spans = _inner(setting, kind.ffn, (kind.down,), kind.start + kind.down.module)
        ups = None if spans is None else cuts.up_by_inner(kind.gate_up, kind.ffn, spans)
        downs = None if spans is None else cuts.down_by_inner(kind.down, spans)
        yield "gate_up", _linear(setting, kind.gate_up, phase.tokens, (COLUMN, ALL, INNER, ups)), kind.ffn
        found = _linear(setting, (kind.down,), phase.tokens, (ROW, INNER, PENDING, downs), columns=True)
        yield "down", found, model.hidden


def embedding(setting: Setting, phase: Phase) -> list[Way]:
    """Return the ways of the embedding."""
    weight, ranks = setting.model.embedding, setting.ranks
    timed, none = setting.kernels.lookup(phase.tokens, weight.ic), (0,) * ranks
    found = [Way(REPLICATE, ALL, ALL, REPLICATE, cuts.whole((weight,), ranks), timed, none)]
    rows = _legal(lambda: cuts.by_rows(weight, ranks, "the vocabulary")) if ranks > 1 else None
    if rows is not None:
        found.append(Way(VOCAB, ALL, PENDING, VOCAB, rows, timed, none))
    return found


def head(setting: Setting, phase: Phase) -> list[Way]:
    """Return the ways of the output head; it makes logits of the last token of every row."""
    weight, ranks = setting.model.out, setting.ranks
    rows = _legal(lambda: cuts.by_rows(weight, ranks, "the vocabulary")) if ranks > 1 else None
    return [
        way for way in _linear(setting, (weight,), phase.rows, (VOCAB, ALL, VOCABULARY, rows)) if way.name != SEQUENCE
    ]


def sample(setting: Setting, phase: Phase) -> list[Way]:
    """Return the one way to draw tokens: of whole logits, on the first rank, while others wait."""
    timed = setting.kernels.sample(phase.rows, setting.model.vocabulary)
    return [Way(REPLICATE, ALL, ALL, REPLICATE, ((),) * setting.ranks, timed, (0,) * setting.ranks)]


def norms(setting: Setting, tokens: int) -> list[Way]:
    """Return the ways of the norm behind all layers."""
    return _norms(setting, tokens)


def _norms(setting: Setting, tokens: int) -> list[Way]:
    hidden, ranks = setting.model.hidden, setting.ranks
    none: tuple[Pieces, ...] = ((),) * ranks
    found = [Way(REPLICATE, ALL, ALL, "", none, setting.kernels.norm(tokens, hidden), (0,) * ranks)]
    if 1 < ranks <= tokens:
        timed = setting.kernels.norm(-(-tokens // ranks), hidden)
        found.append(Way(SEQUENCE, TOKENS, TOKENS, "", none, timed, (0,) * ranks))
    return found


def _linear(
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
        rows = _legal(lambda: cuts.by_rows(weights[0], ranks, weights[0].module))
        if rows is not None:
            found.append(Way(COLUMN, ALL, CHANNELS, COLUMN, rows, setting.longest(rows, tokens), none))
    return found


def _qkv(setting: Setting, kind: Kind, phase: Phase) -> list[Way]:
    heads = _legal(lambda: cuts.heads_of(kind, setting.ranks)) if setting.ranks > 1 else None
    pieces = None if heads is None else cuts.qkv_by_heads(kind, heads)
    return _linear(setting, (*kind.whole, *kind.qkv), phase.tokens, (COLUMN, ALL, HEADS, pieces))


def _out(setting: Setting, kind: Kind, phase: Phase) -> list[Way]:
    heads = _legal(lambda: cuts.heads_of(kind, setting.ranks)) if setting.ranks > 1 else None
    pieces = None if heads is None else cuts.out_by_heads(kind, heads)
    return _linear(setting, (kind.out,), phase.tokens, (ROW, HEADS, PENDING, pieces), columns=True)


def _attention(setting: Setting, kind: Kind, phase: Phase) -> list[Way]:
    workload, ranks = setting.workload, setting.ranks
    none: tuple[Pieces, ...] = ((),) * ranks
    whole = (workload.pages_bytes(kind.kv_heads, kind.head_dim),) * ranks
    found = [
        Way(REPLICATE, ALL, ALL, REPLICATE, none, attended(setting, kind, phase, kind.heads, kind.kv_heads), whole)
    ]
    heads = _legal(lambda: cuts.heads_of(kind, ranks)) if ranks > 1 else None
    if heads is not None:
        counts = [(_width(own.queries), _width(own.keys)) for own in heads]
        timed = max(
            (attended(setting, kind, phase, *pair) for pair in dict.fromkeys(counts)), key=lambda timed: timed.seconds
        )
        kv = tuple(workload.pages_bytes(keys, kind.head_dim) for _, keys in counts)
        found.append(Way(HEAD, HEADS, HEADS, HEAD, none, timed, kv, tuple(own.queries for own in heads)))
    return found


def attended(setting: Setting, kind: Kind, phase: Phase, heads: int, kv_heads: int) -> Timed:
    """Return what attention takes with so many heads."""
    if phase.name == PREFILL:
        return setting.kernels.prompt_attention(phase.rows, phase.length, heads, kind.head_dim, kind.window)
    length = min(phase.length, kind.window or phase.length)
    nbytes = phase.rows * length * setting.workload.token_bytes(kv_heads, kind.head_dim)
    return setting.kernels.attention(phase.rows, length, kv_heads, nbytes)


def _experts(setting: Setting, kind: Kind, experts: Experts, phase: Phase) -> list[Way]:
    ranks, none, tokens = setting.ranks, (0,) * setting.ranks, phase.tokens
    routed, routers = (*experts.gate_up, experts.down), cuts.whole((experts.router,), ranks)
    what = kind.start + experts.down.module
    if setting.axes.expert > 1:
        return [_spread(setting, experts, phase, what)]
    every = tuple(pieces + _all(routed, experts.shared) for pieces in routers)
    found = [Way(REPLICATE, ALL, ALL, REPLICATE, every, experts_timed(setting, experts, every[0], tokens), none)]
    if ranks == 1:
        return found
    shared = _shared(setting, experts, what)
    spans = _inner(setting, experts.ffn, (experts.down,), what)
    if spans is not None and shared is not None:
        ups = cuts.up_by_inner(experts.gate_up, experts.ffn, spans, experts.interleaved)
        downs = cuts.down_by_inner(experts.down, spans)
        pieces = tuple(a + b + c + d for a, b, c, d in zip(routers, ups, downs, shared, strict=True))
        found.append(_slowest(TENSOR, ALL, PENDING, pieces, setting, experts, tokens))
    if experts.count >= ranks and shared is not None:
        owned = cuts.dealt(routed, ranks, what)
        pieces = tuple(a + b + c for a, b, c in zip(routers, owned, shared, strict=True))
        found.append(_slowest(EXPERT, ALL, PENDING, pieces, setting, experts, tokens))
    return found


def _spread(setting: Setting, experts: Experts, phase: Phase, what: str) -> Way:
    """Return the way of experts that several replicas have together: tokens are sent to where their experts are."""
    axes, ranks = setting.axes, setting.ranks
    group = axes.expert * ranks
    owned = cuts.dealt((*experts.gate_up, experts.down), group, what)
    pieces = tuple(tuple(map(Piece, (experts.router, *experts.shared))) + own for own in owned[:ranks])
    own_tokens = -(-phase.tokens // ranks)
    timed = experts_timed(setting, experts, pieces[0], phase.tokens * axes.expert, own_tokens, group)
    nbytes = min(experts.top_k, group) * own_tokens * setting.model.hidden * PLAIN_BYTES
    sent = setting.links.exchange(ALL_TO_ALL, nbytes, axes.expert_group)
    exchanged = Timed(2 * sent.seconds, f"2 x {sent.words}: {sent.source}")
    layout = TOKENS if ranks > 1 else ALL
    held = f"{EXPERT} over {group}"
    return Way(EXPERT, layout, layout, held, pieces, timed + exchanged, (0,) * ranks)


def experts_timed(
    setting: Setting, experts: Experts, pieces: Pieces, tokens: int, own_tokens: int | None = None, ranks: int = 0
) -> Timed:
    """Return what a rank's share of the experts of a layer takes, router and shared ones included.

    Args:
        setting, experts: see there.
        pieces: of the rank: the router, its routed and its shared ones.
        tokens: that go to any experts.
        own_tokens: that the router and the shared ones of this rank have; `None` is all.
        ranks: that have the experts together; 0 is as many as the axes have tensor ranks.
    """
    own_tokens = tokens if own_tokens is None else own_tokens
    routed = [piece for piece in pieces if piece.weight in (*experts.gate_up, experts.down)]
    others = tuple(piece for piece in pieces if piece not in routed)
    router = setting.product(tuple(piece for piece in others if piece.weight is experts.router), own_tokens)
    shared = [piece for piece in others if piece.weight is not experts.router]
    found = router
    for piece_group in (shared[:-1], shared[-1:]):
        if piece_group:
            found += setting.product(tuple(piece_group), own_tokens)
    copies = routed[0].copies
    ups, downs = routed[:-1], routed[-1]
    top_k = experts.top_k
    if copies < experts.count:  # those with most to do are waited for
        sharers = ranks or setting.ranks
        top_k = max(1, min(top_k, copies))
        pairs = busiest(tokens * experts.top_k, sharers, tokens * top_k)
        tokens = max(1, round(pairs / top_k))
    levels: dict[object, int] = {}
    for piece in ups:
        for scheme, rows in piece.weight.levels(piece.part):
            levels[scheme] = levels.get(scheme, 0) + rows
    sizes = (ups[0].shape[1], downs.shape[1])
    up_levels = tuple(levels.items())
    return found + setting.kernels.experts(
        up_levels,  # type: ignore[arg-type]
        downs.weight.levels(downs.part),
        sizes,
        copies,
        top_k,
        tokens,
    )


def _slowest(
    name: str,
    reads: str,
    gives: str,
    pieces: tuple[Pieces, ...],
    setting: Setting,
    experts: Experts,
    tokens: int,
) -> Way:
    timed = max(
        (experts_timed(setting, experts, own, tokens) for own in dict.fromkeys(pieces)), key=lambda one: one.seconds
    )
    return Way(name, reads, gives, name, pieces, timed, (0,) * setting.ranks)


def _all(routed: tuple[Weight, ...], shared: tuple[Weight, ...]) -> Pieces:
    return tuple(map(Piece, (*routed, *shared)))


def _shared(setting: Setting, experts: Experts, what: str) -> tuple[Pieces, ...] | None:
    """Return the parts of the shared experts that every rank has: inner channels, as of a feed-forward network."""
    if not experts.shared:
        return ((),) * setting.ranks
    *gate_up, down = experts.shared
    spans = _inner(setting, experts.shared_ffn, (down,), what)
    if spans is None:
        return None
    ups = cuts.up_by_inner(tuple(gate_up), experts.shared_ffn, spans)
    return tuple(a + b for a, b in zip(ups, cuts.down_by_inner(down, spans), strict=True))


def _inner(setting: Setting, channels: int, downs: tuple[Weight, ...], what: str) -> tuple[Span, ...] | None:
    return _legal(lambda: cuts.inner(channels, downs, setting.ranks, what)) if setting.ranks > 1 else None


def _channels(kind: Kind) -> int:
    return sum(weight.oc for weight in kind.qkv)


def _width(span: Span) -> int:
    return span[1] - span[0]


def _legal(make: Callable[[], _T]) -> _T | None:
    """Return what a cut gives, or `None` where no cut respects the quanta."""
    try:
        return make()
    except ShapeError:
        return None
