"""Which kernels can the steps of a decoder ask for? All parts of it are looked at; no number of a weight is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from tersor.hardware import Chip
from tersor.kernels.deciding import MOST_NORMED_CHANNELS, MOST_TOKENS
from tersor.kernels.dense import Norm
from tersor.kernels.jit import KernelSource
from tersor.kernels.routing import Choice
from tersor.layouts import (
    MixedWeight,
    PackedWeight,
    SparseWeight,
    Stacked,
    StackedMixedWeight,
    TiledSparseWeight,
    sets_of,
)
from tersor.models.decoder import Decoder
from tersor.models.latent import LatentAttention
from tersor.models.mixture import Mixture
from tersor.models.norm import NormWeights, behind_sum, gain_of, weights_around, weights_read
from tersor.models.weights import Activated, Embedding, FeedForward, GatedProduct, Product, Products
from tersor.ops import mode, needed, needed_small, needed_sparse, serve_routing
from tersor.ops.attention_form import AttentionForm
from tersor.ops.quantized import common_activations

_NO_NORM = frozenset({Norm.NONE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What steps there may be.

    Attributes:
        tokens: of a step at most.
        rows: of a step at most.
        queries: tokens of a row in it at most.
        length: tokens of a text at most, whole pages.
        pages: dtype of keys and values; `None` is that of activations.
        draws: whether tokens are drawn here.
    """

    tokens: int
    rows: int
    queries: int
    length: int
    pages: torch.dtype | None = None
    draws: bool = True


def kernels_of(decoder: Decoder, steps: Steps, chip: Chip) -> list[KernelSource]:
    """Return every kernel that steps can ask for on a chip, each once.

    Args:
        decoder: with its weights, or an `outline`.
        steps: what there may be.
        chip: the GPU.
    """
    if mode.current().reference:
        return []
    dtype, hidden = decoder.dtype, decoder.config.hidden
    found: dict[KernelSource, None] = {}
    seen: set[Any] = set()
    norms, readers = _norms(decoder, chip), _readers(decoder)
    for part in _parts((decoder.embedding, decoder.layers, decoder.norm, decoder.head)):
        own = norms.get(id(part), _NO_NORM)
        read = readers.get(id(part), ())
        kind = _kind(part), own, common_activations(read)
        if kind not in seen:
            seen.add(kind)
            found.update(dict.fromkeys(_asked(part, dtype, steps, chip, own, read)))
    found.update(dict.fromkeys(needed_small.tokens_of_steps()))
    found.update(dict.fromkeys(needed_small.rows(hidden, dtype, torch.int32)))
    if decoder.config.softcap is not None and decoder.head is not None:
        found.update(dict.fromkeys(needed_small.numbers(decoder.config.vocabulary, dtype, capped=True)))
    ranks = {one.count for layer in decoder.layers for one in (layer.ranks, layer.inner_ranks)}
    found.update(dict.fromkeys(needed_small.sums(dtype, max(ranks))))
    if steps.draws:
        found.update(dict.fromkeys(needed.draws(decoder.config.vocabulary, dtype)))
    return list(found)


def _norms(decoder: Decoder, chip: Chip) -> dict[int, frozenset[Norm]]:
    """Return identity of a product, or of experts -> what it has of the norms around it in steps of few tokens."""
    found: dict[int, set[Norm]] = {}

    def between(norm: NormWeights, first: Product, reader: object) -> None:
        around = weights_around(norm, first, reader)
        folds = around is not None and needed.folds_norm(*around, decoder.dtype, chip)
        second = reader.product if isinstance(reader, Activated) else reader
        for product, side in ((first, Norm.OUT), (second, Norm.IN)):
            found.setdefault(id(product), set()).add(side if folds else Norm.NONE)

    for layer in decoder.layers:
        if isinstance(layer.ffn, FeedForward):
            between(layer.norms[1], layer.attention.out, layer.ffn.up)
        elif layer.out_norms is None and gain_of(layer.norms[1], MOST_NORMED_CHANNELS) is not None:
            found.setdefault(id(layer.ffn), set()).add(Norm.IN)
        else:
            found.setdefault(id(layer.ffn), set()).add(Norm.NONE)
    for layer, following in zip(decoder.layers, decoder.layers[1:], strict=False):
        if isinstance(layer.ffn, FeedForward):
            between(following.norms[0], layer.ffn.down, following.attention.reader)
        else:
            found.setdefault(id(following.attention.reader), set()).add(Norm.NONE)
            behind = behind_sum(following.norms[0], following.attention.reader)
            if layer.out_norms is None and layer.inner_ranks.count == 1 and behind is not None:
                found.setdefault(id(layer.ffn), set()).add(Norm.OUT)
    return {product: frozenset(norms) for product, norms in found.items()}


def _readers(decoder: Decoder) -> dict[int, tuple[PackedWeight | MixedWeight, ...]]:
    """Return identity of a norm or an activation -> the weights of what reads its result, packed or mixed products
    alone."""
    found: dict[int, tuple[PackedWeight | MixedWeight, ...]] = {}
    for layer in decoder.layers:
        attention, ffn = layer.attention, layer.ffn
        pairs: list[tuple[NormWeights | Activated | None, object]] = [(layer.norms[0], attention.reader)]
        if isinstance(ffn, FeedForward):
            pairs.append((layer.norms[1], ffn.up))
        inner = ffn if isinstance(ffn, FeedForward) else ffn.shared
        if inner is not None and isinstance(inner.up, Activated):
            pairs.append((inner.up, inner.down))
        if isinstance(attention, LatentAttention):
            pairs.append((attention.query_norm, attention.query_up))
            pairs.append((attention.key_value_norm, attention.key_value_up))
        found.update((id(norm), weights_read(reader)) for norm, reader in pairs)
    return found


def _parts(value: Any) -> Iterator[Any]:
    """Yield the parts of a decoder that ask for kernels, in whatever they are."""
    if isinstance(value, tuple):
        for one in value:
            yield from _parts(one)
    elif isinstance(value, Product | GatedProduct | NormWeights | Embedding | AttentionForm):
        yield value
    elif is_dataclass(value) and not isinstance(
        value, PackedWeight | MixedWeight | SparseWeight | TiledSparseWeight | Stacked | type
    ):
        if isinstance(value, Mixture | Activated | LatentAttention):
            yield value
        for field in fields(value):
            yield from _parts(getattr(value, field.name))


def _kind(part: Any) -> Any:
    """Return what decides which kernels a part asks for."""
    if isinstance(part, Product | GatedProduct):
        return _gate(part), _described(part.weight)
    if isinstance(part, Activated):
        return part.gate, _outputs(part.product)
    if isinstance(part, LatentAttention):
        return part.heads
    if isinstance(part, NormWeights):
        return part.form.centered, part.weight.shape
    if isinstance(part, Mixture):
        described = map(_described, (part.router.weight, part.gate_up, part.down))
        router = part.router.weight
        return part.form, part.gate, router.dtype if isinstance(router, torch.Tensor) else None, *described
    return part if isinstance(part, AttentionForm) else id(part)


def _described(weight: Any) -> Any:
    if isinstance(weight, StackedMixedWeight):
        return tuple(map(_described, weight.sets))
    if isinstance(weight, SparseWeight):
        return weight.sparse, weight.shape
    if isinstance(weight, TiledSparseWeight):
        return weight.key, weight.shape, weight.tiles.places
    if isinstance(weight, MixedWeight):
        return weight.mix, tuple(_described(one) for one in weight.sets)
    return weight.shape if isinstance(weight, torch.Tensor) else (weight.scheme, tuple(weight.shape), weight.layout)


def _asked(
    part: Any,
    dtype: torch.dtype,
    steps: Steps,
    chip: Chip,
    norms: frozenset[Norm],
    readers: tuple[PackedWeight | MixedWeight, ...],
) -> Iterator[KernelSource]:
    """Yield the kernels of one part."""
    if isinstance(part, Product | GatedProduct):
        if isinstance(part.weight, PackedWeight):
            yield from needed.linear(part.weight, dtype, _gate(part), steps.tokens, chip, norms)
        elif isinstance(part.weight, MixedWeight):
            yield from needed.mixed_linear(part.weight, dtype, _gate(part), steps.tokens, chip)
        elif isinstance(part.weight, SparseWeight | TiledSparseWeight):
            yield from needed_sparse.linear(part.weight, dtype, _gate(part), steps.tokens, chip)
    elif isinstance(part, NormWeights):
        yield from needed_small.norm(steps.tokens, len(part.weight), dtype, part.form.centered, chip, readers)
    elif isinstance(part, AttentionForm):
        yield from needed.attention(part, dtype, steps.pages or dtype, steps.rows, steps.queries, steps.length, chip)
    elif isinstance(part, Embedding):
        yield from _rows(part, dtype)
    elif isinstance(part, Activated):
        channels = _outputs(part.product) // (2 if part.gate else 1)
        yield from needed_small.activation(channels, dtype, part.gate, chip, readers)
    elif isinstance(part, LatentAttention):
        yield from needed_small.latent_heads(part.heads, dtype)
    else:
        yield from _experts(part, dtype, steps, chip, norms)


def _gate(part: Product | GatedProduct) -> int:
    """Return how gate and up become one in a product, or 0."""
    return int(part.gate) if isinstance(part, GatedProduct) else 0


def _outputs(product: Product | Products) -> int:
    """Return the channels that a product makes."""
    parts = product.parts if isinstance(product, Products) else (product,)
    return sum(part.weight.shape[0] for part in parts)


def _rows(part: Embedding, dtype: torch.dtype) -> Iterator[KernelSource]:
    channels = part.weight.shape[1]
    together = part.ranks.count == 1 and not isinstance(part.weight, PackedWeight)
    if together or not isinstance(part.weight, PackedWeight) or part.positions is not None:
        yield from needed_small.rows(channels, dtype, torch.int64, together and part.positions is not None)


def _experts(
    part: Mixture, dtype: torch.dtype, steps: Steps, chip: Chip, of_norms: frozenset[Norm]
) -> Iterator[KernelSource]:
    choice, logits = choice_of(part), torch.float32 if part.form.wide else dtype
    gate_up, down, router = part.gate_up, part.down, part.router.weight
    some = part.held < part.form.count
    if some:
        yield from needed.tables(part.held)
    if isinstance(router, torch.Tensor):
        decided = [] if some else list(_decided(part, router, choice, dtype, steps, chip, of_norms))
        yield from decided
        beyond = MOST_TOKENS if decided else 0
        yield from needed.router(router, dtype, part.form.wide, steps.tokens, beyond)
    if isinstance(gate_up, Stacked) and isinstance(down, Stacked):
        yield from needed.experts_of(gate_up, down, choice, part.gate, dtype, logits, steps.tokens, chip)
        return
    yield from needed.route(choice, logits)
    yield from needed.combine(dtype)
    yield from needed_small.numbers(gate_up.shape[1] // 2, dtype, part.gate)
    for of in (gate_up, down):
        for weight in () if isinstance(of, torch.Tensor) else sets_of(of):
            yield from needed.linear(weight.expert(0), dtype, 0, steps.tokens, chip)


def _decided(
    part: Mixture,
    router: torch.Tensor,
    choice: Choice,
    dtype: torch.dtype,
    steps: Steps,
    chip: Chip,
    of_norms: frozenset[Norm],
) -> Iterator[KernelSource]:
    """Yield the kernels around experts of few tokens, which have the norms ahead of them and behind."""
    gate_up, down = part.gate_up, part.down
    if not isinstance(gate_up, Stacked) or not isinstance(down, Stacked):
        return
    if needed.experts_misfit(gate_up, down, dtype, chip):
        return
    found: list[KernelSource] = []
    for norms in sorted({norm is Norm.IN for norm in of_norms - {Norm.OUT}}):
        found += needed.decide(router, dtype, part.form.wide, choice, norms, steps.tokens)
    if found and Norm.OUT in of_norms:
        found += needed.decided_sum(down.shape[1], dtype)
    yield from found


def choice_of(part: Mixture) -> Choice:
    """Return how the experts of a layer are chosen."""
    form = part.form
    biased = part.choice_bias is not None
    return serve_routing.choice_of(
        form.count, form.top_k, form.scoring, form.normalize, biased, form.groups, form.top_groups
    )
