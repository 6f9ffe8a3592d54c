"""Which kernels can the steps of a decoder ask for? All parts of it are looked at; no number of a weight is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from tersor.hardware import Chip
from tersor.kernels.jit import KernelSource
from tersor.kernels.routing import Choice
from tersor.layouts import PackedWeight, StackedWeight
from tersor.models.decoder import Decoder
from tersor.models.mixture import Mixture
from tersor.models.norm import NormWeights
from tersor.models.weights import Embedding, GatedProduct, Product
from tersor.ops import mode, needed, serve_routing
from tersor.ops.attention_form import AttentionForm


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What steps there may be.

    Attributes:
        tokens: of a step at most.
        queries: of a row in it at most.
        length: tokens of a text at most, whole pages.
        pages: dtype of keys and values; `None` is that of activations.
        draws: whether tokens are drawn here.
    """

    tokens: int
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
    for part in _parts((decoder.embedding, decoder.layers, decoder.norm, decoder.head)):
        kind = _kind(part)
        if kind not in seen:
            seen.add(kind)
            found.update(dict.fromkeys(_asked(part, dtype, steps, chip)))
    found.update(dict.fromkeys(needed.tokens_of_steps()))
    found.update(dict.fromkeys(needed.rows(hidden, dtype, torch.int32)))
    found.update(dict.fromkeys(needed.sums(dtype, decoder.layers[0].ranks.count)))
    if steps.draws:
        found.update(dict.fromkeys(needed.draws(decoder.config.vocabulary, dtype)))
    return list(found)


def _parts(value: Any) -> Iterator[Any]:
    """Yield the parts of a decoder that ask for kernels, in whatever they are."""
    if isinstance(value, tuple):
        for one in value:
            yield from _parts(one)
    elif isinstance(value, Product | GatedProduct | NormWeights | Embedding | AttentionForm):
        yield value
    elif is_dataclass(value) and not isinstance(value, PackedWeight | StackedWeight | type):
        if isinstance(value, Mixture):
            yield value
        for field in fields(value):
            yield from _parts(getattr(value, field.name))


def _kind(part: Any) -> Any:
    """Return what decides which kernels a part asks for."""
    if isinstance(part, Product | GatedProduct):
        return type(part), _described(part.weight)
    if isinstance(part, NormWeights):
        return part.form.centered, part.weight.shape
    if isinstance(part, Mixture):
        return part.form, part.gate, _described(part.gate_up), _described(part.down)
    return part if isinstance(part, AttentionForm) else id(part)


def _described(weight: Any) -> Any:
    return weight.shape if isinstance(weight, torch.Tensor) else (weight.scheme, tuple(weight.shape), weight.layout)


def _asked(part: Any, dtype: torch.dtype, steps: Steps, chip: Chip) -> Iterator[KernelSource]:
    """Yield the kernels of one part."""
    if isinstance(part, Product | GatedProduct):
        if isinstance(part.weight, PackedWeight):
            yield from needed.linear(part.weight, dtype, isinstance(part, GatedProduct), steps.tokens, chip)
    elif isinstance(part, NormWeights):
        yield from needed.norm(len(part.weight), dtype, part.form.centered)
    elif isinstance(part, AttentionForm):
        yield from needed.attention(part, dtype, steps.pages or dtype, steps.queries, steps.length, chip)
    elif isinstance(part, Embedding):
        yield from _rows(part, dtype)
    else:
        yield from _experts(part, dtype, steps, chip)


def _rows(part: Embedding, dtype: torch.dtype) -> Iterator[KernelSource]:
    channels = part.weight.shape[1]
    together = part.ranks.count == 1 and not isinstance(part.weight, PackedWeight)
    if together or not isinstance(part.weight, PackedWeight) or part.positions is not None:
        yield from needed.rows(channels, dtype, torch.int64, together and part.positions is not None)


def _experts(part: Mixture, dtype: torch.dtype, steps: Steps, chip: Chip) -> Iterator[KernelSource]:
    choice, logits = choice_of(part), torch.float32 if part.form.wide else dtype
    gate_up, down = part.gate_up, part.down
    if isinstance(gate_up, StackedWeight) and isinstance(down, StackedWeight):
        yield from needed.experts_of(gate_up, down, choice, part.gate, dtype, logits, steps.tokens, chip)
        return
    yield from needed.route(choice, logits)
    yield from needed.combine(dtype)
    for weight in (gate_up, down):
        if isinstance(weight, StackedWeight):
            yield from needed.linear(weight.expert(0), dtype, False, steps.tokens, chip)


def choice_of(part: Mixture) -> Choice:
    """Return how the experts of a layer are chosen."""
    form = part.form
    biased = part.choice_bias is not None
    return serve_routing.choice_of(
        form.count, form.top_k, form.scoring, form.normalize, biased, form.groups, form.top_groups
    )
