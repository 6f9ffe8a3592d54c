"""Which part of a model has a rank? Spans of every tensor that is cut, by name: one table for loading and for tests.

Heads are cut whole, with the columns of the output that read them; a feed-forward network by its inner channels: rows
of gate and up, columns of down, and so in every expert; embedding and head by tokens. Norms, routers and positions are
on every rank. A product whose columns are cut gives sums that all ranks add up, so its bias is on the first alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tersor.checkpoint.names import Form
from tersor.layouts.shard import Heads, Part, Span, cut, cut_heads, cut_rows, quantum
from tersor.models.config import DecoderConfig, Experts, Latent
from tersor.models.names import Names
from tersor.ops.attention_form import AttentionForm

_ALL = Part()


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has of a decoder.

    Attributes:
        forms: of the attention of every layer, with the rank's own heads.
        vocabulary: rows of embedding and head of every rank.
        parts: module, or whole name of a vector -> its part; all of what is not named.
    """

    forms: tuple[AttentionForm, ...]
    vocabulary: tuple[Span, ...]
    parts: dict[str, Part] = field(default_factory=dict)

    @staticmethod
    def of(config: DecoderConfig, names: Names, schemes: Mapping[str, Form], rank: int, ranks: int) -> Share:
        """Return what a rank has.

        Args:
            config: of the whole decoder.
            names: of its checkpoint.
            schemes: module -> scheme of its packed weight, or the levels of its output features.
            rank, ranks: which of how many.

        Raises:
            ShapeError: there are fewer heads or channels than ranks can have a share of; the line names the module.
        """
        forms = tuple(layer.attention for layer in config.layers)
        if ranks == 1:
            return Share(forms, ((0, config.vocabulary),))
        parts: dict[str, Part] = {}
        vocabulary = cut_rows(config.vocabulary, ranks, what="the vocabulary")
        for module in (names.base + names.embedding, names.head):
            parts[module] = Part((vocabulary[rank],))
        heads = []
        for index, layer in enumerate(config.layers):
            start, form = names.base + names.layer.format(layer=index), layer.attention
            out = start + names.out
            unit = quantum(schemes.get(out))
            width = form.head_dim if config.latent is None else config.latent.value  # of a head, where `out` reads it
            heads.append(cut_heads(form.heads, form.kv_heads, width, ranks, unit, what=out)[rank])
            if config.latent is None:
                parts |= _attention(form, names, start, heads[-1])
            else:
                parts |= _latent(config.latent, names, start, heads[-1])
            if layer.experts is None:
                parts |= _feed_forward(
                    [start + name for name in names.gate_up],
                    start + names.down,
                    config,
                    config.ffn,
                    schemes,
                    rank,
                    ranks,
                )
            else:
                parts |= _experts(config, names, start, layer.experts, schemes, rank, ranks)
        return Share(tuple(map(_with, forms, heads)), vocabulary, parts)

    def shape(self, name: str, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the rank's part of a tensor."""
        return self.parts.get(name, _ALL).shape(whole)


def _with(form: AttentionForm, heads: Heads) -> AttentionForm:
    queries, keys = (last - first for first, last in (heads.queries, heads.keys))
    return replace(form, heads=queries, kv_heads=keys)


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


def _feed_forward(
    gate_up: Sequence[str],
    down: str,
    config: DecoderConfig,
    channels: int,
    schemes: Mapping[str, Form],
    rank: int,
    ranks: int,
) -> dict[str, Part]:
    span = first, last = cut(channels, ranks, quantum(schemes.get(down)), what=down)[rank]
    rows: tuple[Span, ...] = (span,)
    if config.gate is not None and len(gate_up) == 1:  # both in one, the gate first
        rows = (span, (channels + first, channels + last))
    parts = {down: Part(columns=span)}
    for name in gate_up:
        parts[name] = parts[f"{name}.bias"] = Part(rows)
    return parts


def _experts(
    config: DecoderConfig,
    names: Names,
    start: str,
    experts: Experts,
    schemes: Mapping[str, Form],
    rank: int,
    ranks: int,
) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    if names.fused:
        gate_up, down = (start + name for name in names.fused)
        first, last = span = cut(experts.ffn, ranks, quantum(schemes.get(down)), what=down)[rank]
        pairs = (2 * first, 2 * last)  # rows of gate and up take turns
        parts = {gate_up: Part((pairs,)), down: Part(columns=span), f"{gate_up}_bias": Part(columns=pairs)}
    else:
        each = [[start + name.format(expert=index) for name in names.expert] for index in range(experts.count)]
        unit = math.lcm(*(quantum(schemes.get(down)) for _, _, down in each))
        span = cut(experts.ffn, ranks, unit, what=each[0][2])[rank]
        for gate, up, down in each:
            parts |= {gate: Part((span,)), up: Part((span,)), down: Part(columns=span)}
    if experts.shared:
        shared = [start + name for name in names.shared_gate_up]
        parts |= _feed_forward(shared, start + names.shared_down, config, experts.shared, schemes, rank, ranks)
    return parts
