"""In which ways can each block of a layer be cut? Attention by heads or rows, networks by channels, or experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tersor.layouts.shard import Span
from tersor.planner import cuts
from tersor.planner.cost import Timed, busiest
from tersor.planner.cuts import Piece, Pieces
from tersor.planner.links import ALL_TO_ALL
from tersor.planner.parts import PLAIN_BYTES, Experts, Kind, Weight, Workload
from tersor.planner.ways import (
    ALL,
    BATCH,
    COLUMN,
    DECODE,
    EXPERT,
    HEAD,
    HEADS,
    INNER,
    PENDING,
    PREFILL,
    REPLICATE,
    ROW,
    TENSOR,
    TOKENS,
    Phase,
    Setting,
    Way,
    legal,
    linear,
    norms,
)


def of_layer(setting: Setting, kind: Kind, phase: Phase) -> Iterator[tuple[str, list[Way], int]]:
    """Yield the blocks of a layer in order: name, ways, and channels of what the block gives."""
    model, hidden = setting.model, setting.model.hidden
    yield "norm", norms(setting, phase.tokens), hidden
    yield "qkv", _qkv(setting, kind, phase), _channels(kind)
    yield "attention", _attention(setting, kind, phase), kind.heads * kind.value_dim
    yield "out", _out(setting, kind, phase), hidden
    yield "ffn_norm", norms(setting, phase.tokens), hidden
    if kind.experts is not None:
        yield "experts", _experts(setting, kind, kind.experts, phase), hidden
    elif kind.down is not None:
        spans = _inner(setting, kind.ffn, (kind.down,), kind.start + kind.down.module)
        ups = None if spans is None else cuts.up_by_inner(kind.gate_up, kind.ffn, spans)
        downs = None if spans is None else cuts.down_by_inner(kind.down, spans)
        yield "gate_up", linear(setting, kind.gate_up, phase.tokens, (COLUMN, ALL, INNER, ups)), kind.ffn
        found = linear(setting, (kind.down,), phase.tokens, (ROW, INNER, PENDING, downs), columns=True)
        yield "down", found, model.hidden


def _qkv(setting: Setting, kind: Kind, phase: Phase) -> list[Way]:
    heads = legal(lambda: cuts.heads_of(kind, setting.ranks)) if setting.ranks > 1 else None
    pieces = None if heads is None else cuts.qkv_by_heads(kind, heads)
    return linear(setting, (*kind.whole, *kind.qkv), phase.tokens, (COLUMN, ALL, HEADS, pieces))


def _out(setting: Setting, kind: Kind, phase: Phase) -> list[Way]:
    heads = legal(lambda: cuts.heads_of(kind, setting.ranks)) if setting.ranks > 1 else None
    pieces = None if heads is None else cuts.out_by_heads(kind, heads)
    return linear(setting, (kind.out,), phase.tokens, (ROW, HEADS, PENDING, pieces), columns=True)


def _attention(setting: Setting, kind: Kind, phase: Phase) -> list[Way]:
    workload, ranks = setting.workload, setting.ranks
    none: tuple[Pieces, ...] = ((),) * ranks
    whole = (workload.pages_bytes(kind.kv_heads, kind.head_dim),) * ranks
    found = [
        Way(REPLICATE, ALL, ALL, REPLICATE, none, attended(setting, kind, phase, kind.heads, kind.kv_heads), whole)
    ]
    if ranks == 1:
        return found
    heads = legal(lambda: cuts.heads_of(kind, ranks))
    if heads is not None:
        counts = [(_width(own.queries), _width(own.keys)) for own in heads]
        timed = max(
            (attended(setting, kind, phase, *pair) for pair in dict.fromkeys(counts)), key=lambda timed: timed.seconds
        )
        kv = tuple(workload.pages_bytes(keys, kind.head_dim) for _, keys in counts)
        found.append(Way(HEAD, HEADS, HEADS, HEAD, none, timed, kv, tuple(own.queries for own in heads)))
    rows = phase.rows if phase.name == DECODE else workload.batch
    if rows >= ranks:
        layout = TOKENS if phase.name == DECODE else ALL  # a prompt is attended by all, and kept by one
        timed = attended(setting, kind, by_rows(phase, ranks), kind.heads, kind.kv_heads)
        own = workload.pages_bytes(kind.kv_heads, kind.head_dim, kept_rows(workload, rows, ranks))
        found.append(Way(BATCH, layout, layout, BATCH, none, timed, (own,) * ranks))
    return found


def by_rows(phase: Phase, ranks: int) -> Phase:
    """Return what a rank computes of a pass whose rows are dealt out; a prompt is one row, of which each has all."""
    return replace(phase, rows=-(-phase.rows // ranks)) if phase.name == DECODE else phase


def kept_rows(workload: Workload, rows: int, ranks: int) -> int:
    """Return the rows whose pages a rank keeps, at most, of micro-batches of so many rows that ranks deal out."""
    return -(-workload.batch // rows) * -(-rows // ranks)


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
    return legal(lambda: cuts.inner(channels, downs, setting.ranks, what)) if setting.ranks > 1 else None


def _channels(kind: Kind) -> int:
    return sum(weight.oc for weight in kind.qkv)


def _width(span: Span) -> int:
    return span[1] - span[0]
