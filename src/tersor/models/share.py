"""Which part of a model has a rank? Spans of every tensor that is cut, by name: one table for loading and for tests.

Heads are cut whole, with the columns of the output that read them; a feed-forward network by its inner channels: rows
of gate and up, columns of down, and so in every expert that several ranks share; embedding and head by tokens. Norms,
routers and positions are on every rank. A product whose columns are cut gives sums that all ranks add up, so its bias
is on the first alone; what a rank does not have of the experts adds nothing to those sums. The layers are those of the
rank's stage (`planner.placement`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from tersor.checkpoint.names import Form
from tersor.errors import ShapeError
from tersor.layouts.shard import Heads, Part, Span, cut, cut_heads, cut_rows, quantum
from tersor.models.config import DecoderConfig, Experts, Latent
from tersor.models.names import Names
from tersor.ops.attention_form import AttentionForm
from tersor.planner.placement import ALONE, Place, Placement, Stage

_ALL = Part()


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has of a decoder.

    Attributes:
        place: where it is.
        layers: that it has.
        forms: of the attention of each of those, with the rank's own heads.
        vocabulary: rows of embedding and head of every rank of the stage.
        experts: whole experts that it has, or `None` for a part of all.
        parts: module, or whole name of a vector -> its part; all of what is not named.
    """

    place: Place
    layers: Span
    forms: tuple[AttentionForm, ...]
    vocabulary: tuple[Span, ...]
    experts: Span | None = None
    parts: dict[str, Part] = field(default_factory=dict)

    @staticmethod
    def of(config: DecoderConfig, names: Names, schemes: Mapping[str, Form], place: Place | None = None) -> Share:
        """Return what a rank has.

        Args:
            config: of the whole decoder.
            names: of its checkpoint.
            schemes: module -> scheme of its packed weight, or the levels of its output features.
            place: of the rank; `None` is alone.

        Raises:
            ShapeError: there are fewer heads or channels than ranks can have a share of, or cuts that weights do not
                allow; the line names the module.
        """
        where = place or ALONE
        layers = where.stage.layers if place is not None else (0, len(config.layers))
        if layers[1] > len(config.layers):
            raise ShapeError(f"a stage has layers {list(layers)}, and the model has {len(config.layers)}")
        stage, forms = where.stage, tuple(layer.attention for layer in config.layers[slice(*layers)])
        if stage.ranks == 1:
            return Share(where, layers, forms, ((0, config.vocabulary),))
        cutting = _Cutting(config, names, schemes, where)
        vocabulary = cutting.vocabulary()
        parts: dict[str, Part] = {}
        if "vocabulary" not in stage.whole:
            for module in (names.base + names.embedding, names.head):
                parts[module] = Part((vocabulary[where.rank],))
        own, groups = [], [_experts_of(stage, layer.experts) for layer in config.layers[slice(*layers)]]
        experts = {one[where.expert_group] for one in groups if one is not None}
        if len(experts) > 1:
            raise ShapeError("layers of a stage have different numbers of experts: they cannot be dealt out in groups")
        for index in range(*layers):
            start, form = names.base + names.layer.format(layer=index), config.layers[index].attention
            found, heads = cutting.attention(start, form)
            own.append(heads)
            parts |= found | cutting.inner(start, config.layers[index].experts)
        return Share(where, layers, tuple(map(_with, forms, own)), vocabulary, next(iter(experts), None), parts)

    def shape(self, name: str, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the rank's part of a tensor."""
        return self.parts.get(name, _ALL).shape(whole)

    def whole(self, kind: str) -> bool:
        """Whether the rank computes all of one of `placement.WHOLE`, so that nobody adds it up."""
        return self.place.stage.ranks == 1 or kind in self.place.stage.whole


def check(config: DecoderConfig, names: Names, schemes: Mapping[str, Form], placement: Placement) -> None:
    """Hold that a model can be placed so, for every rank.

    Raises:
        ShapeError: it cannot; the line names what does not fit.
    """
    if placement.layers != len(config.layers):
        raise ShapeError(f"the placement is of {placement.layers} layers, and the model has {len(config.layers)}")
    for rank in range(placement.ranks):
        Share.of(config, names, schemes, placement.place(rank))


def _with(form: AttentionForm, heads: Heads | None) -> AttentionForm:
    if heads is None:
        return form
    queries, keys = (last - first for first, last in (heads.queries, heads.keys))
    return replace(form, heads=queries, kv_heads=keys)


def _experts_of(stage: Stage, experts: Experts | None) -> tuple[Span, ...] | None:
    """Return the whole experts of every group of ranks; `None` where all have a part of all, or there are none."""
    if experts is None or stage.expert_groups == 1 or "experts" in stage.whole:
        return None
    count, groups = experts.count, stage.expert_groups
    return _dealt(stage, "experts", count, 1, "experts", lambda: cut(count, groups, tile=1, what="experts"))


def _dealt(
    stage: Stage, kind: str, size: int, unit: int, what: str, even: Callable[[], tuple[Span, ...]]
) -> tuple[Span, ...]:
    """Return the share of every rank: those that the stage says, else even ones.

    Raises:
        ShapeError: the stage's do not end where they must, or do not begin at whole units.
    """
    ends = stage.cuts.get(kind)
    if ends is None:
        return even()
    if ends[-1] != size:
        raise ShapeError(f"{what}: the placement cuts {kind} up to {ends[-1]}, and there are {size}")
    for end in ends[:-1]:
        if end % unit:
            raise ShapeError(f"{what}: the placement cuts {kind} at {end}, and they are cut in units of {unit}")
    return tuple(pairwise(ends))


@dataclass(frozen=True, slots=True)
class _Cutting:
    """The parts of one rank among several of a stage."""

    config: DecoderConfig
    names: Names
    schemes: Mapping[str, Form]
    place: Place

    def vocabulary(self) -> tuple[Span, ...]:
        stage, size = self.place.stage, self.config.vocabulary
        if "vocabulary" in stage.whole:
            return ((0, size),) * stage.ranks
        what = "the vocabulary"
        return _dealt(stage, "vocabulary", size, 1, what, lambda: cut_rows(size, stage.ranks, what=what))

    def attention(self, start: str, form: AttentionForm) -> tuple[dict[str, Part], Heads | None]:
        """Return the parts of an attention, and the heads that they are; `None` is all."""
        config, out = self.config, start + self.names.out
        if "heads" in self.place.stage.whole:
            return {}, None
        unit = quantum(self.schemes.get(out))
        width = form.head_dim if config.latent is None else config.latent.value  # of a head, where `out` reads it
        heads = self._heads(form, width, unit, out)[self.place.rank]
        if config.latent is None:
            return _attention(form, self.names, start, heads), heads
        return _latent(config.latent, self.names, start, heads), heads

    def _heads(self, form: AttentionForm, width: int, unit: int, what: str) -> tuple[Heads, ...]:
        stage, ratio = self.place.stage, form.heads // form.kv_heads
        if "heads" not in stage.cuts:
            return cut_heads(form.heads, form.kv_heads, width, stage.ranks, unit, what=what)
        found = []
        together = unit // math.gcd(unit, width)
        for first, last in _dealt(stage, "heads", form.heads, together, what, tuple):
            keys = (first // ratio, -(-last // ratio))
            if keys[1] - keys[0] > 1 and (first % ratio or last % ratio):
                raise ShapeError(
                    f"{what}: the placement gives a rank heads {first} to {last}, and {ratio} of them read one kv "
                    "head: those of one, or whole groups"
                )
            found.append(Heads((first, last), keys))
        return tuple(found)

    def inner(self, start: str, experts: Experts | None) -> dict[str, Part]:
        """Return the parts of what is behind the attention of a layer."""
        names, config, stage = self.names, self.config, self.place.stage
        if experts is not None:
            return {} if "experts" in stage.whole else self._experts(start, experts)
        if "channels" in stage.whole:
            return {}
        gate_up = [start + name for name in names.gate_up]
        return self._feed_forward("channels", gate_up, start + names.down, config.ffn)

    def _span(self, kind: str, size: int, unit: int, what: str, rank: int) -> Span:
        stage = self.place.stage
        shares = stage.shares(kind)
        if shares == 1:
            return 0, size
        return _dealt(stage, kind, size, unit, what, lambda: cut(size, shares, unit, what=what))[rank]

    def _feed_forward(self, kind: str, gate_up: Sequence[str], down: str, channels: int) -> dict[str, Part]:
        span = self._span(kind, channels, quantum(self.schemes.get(down)), down, self.place.rank)
        first, last = span
        rows: tuple[Span, ...] = (span,)
        if self.config.gate is not None and len(gate_up) == 1:  # both in one, the gate first
            rows = (span, (channels + first, channels + last))
        parts = {down: Part(columns=span)}
        for name in gate_up:
            parts[name] = parts[f"{name}.bias"] = Part(rows)
        return parts

    def _experts(self, start: str, experts: Experts) -> dict[str, Part]:
        names, schemes, rank = self.names, self.schemes, self.place.expert_rank
        parts: dict[str, Part] = {}
        shared = self.place.stage.shares("expert_channels") > 1  # else experts are whole
        if names.fused and shared:
            gate_up, down = (start + name for name in names.fused)
            span = first, last = self._span("expert_channels", experts.ffn, quantum(schemes.get(down)), down, rank)
            pairs = (2 * first, 2 * last)  # rows of gate and up take turns
            parts = {gate_up: Part((pairs,)), down: Part(columns=span), f"{gate_up}_bias": Part(columns=pairs)}
        elif shared:
            each = [[start + name.format(expert=index) for name in names.expert] for index in range(experts.count)]
            unit = math.lcm(*(quantum(schemes.get(down)) for _, _, down in each))
            span = self._span("expert_channels", experts.ffn, unit, each[0][2], rank)
            for gate, up, down in each:
                parts |= {gate: Part((span,)), up: Part((span,)), down: Part(columns=span)}
        if experts.shared:
            gates = [start + name for name in names.shared_gate_up]
            parts |= self._feed_forward("shared_channels", gates, start + names.shared_down, experts.shared)
        return parts


def _attention(form: AttentionForm, names: Names, start: str, heads: Heads) -> dict[str, Part]:
    dim = form.head_dim
    queries, keys = ((first * dim, last * dim) for first, last in (heads.queries, heads.keys))
    if len(names.qkv) > 1:
        spans: list[tuple[Span, ...]] = [(queries,), (keys,), (keys,)]
    else:
        sizes = (0, form.heads * dim, (form.heads + form.kv_heads) * dim)
        together = zip(sizes, (queries, keys, keys), strict=True)
        spans = [tuple((offset + first, offset + last) for offset, (first, last) in together)]
    parts = {start + names.out: Part(columns=queries)}
    for name, rows in zip(names.qkv, spans, strict=True):
        parts[start + name] = parts[f"{start}{name}.bias"] = Part(rows)
    if names.sinks:
        parts[start + names.sinks] = Part((heads.queries,))
    return parts


def _latent(latent: Latent, names: Names, start: str, heads: Heads) -> dict[str, Part]:
    """Cut what is made for every head; the vectors that heads come from are on every rank."""
    first, last = heads.queries
    turned, inner, value = latent.fixed + latent.turned, latent.fixed + latent.value, latent.value
    queries = names.query_up if latent.query else names.query
    return {
        start + queries: Part(((first * turned, last * turned),)),
        start + names.key_value_up: Part(((first * inner, last * inner),)),
        start + names.out: Part(columns=(first * value, last * value)),
    }
