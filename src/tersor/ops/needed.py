"""Which kernels can an operator ask for, in calls of up to so many tokens? Told ahead of the first, without a GPU.

What serves a call is decided as in `dispatch`, `grouped`, `serve_attention` and `serve_routing`, by the same functions;
the mode of linears is that of the moment (`mode.current`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from tersor.formats import Activations, Scheme
from tersor.hardware import Chip
from tersor.kernels import attention as attention_kernels
from tersor.kernels import (
    attention_sm90,
    deciding,
    decode_attention,
    dense,
    experts,
    mixed,
    quantizing,
    routing,
    sampling,
    shared_attention,
    tune,
)
from tersor.kernels.dense import Norm
from tersor.kernels.jit import KernelSource
from tersor.kernels.routing import Choice
from tersor.kernels.tune import experts as tune_experts
from tersor.kernels.tune import mixed as tune_mixed
from tersor.kernels.tune import sm80
from tersor.layouts import STREAM, MixedWeight, PackedWeight, Stacked, sets_of
from tersor.layouts.packing import Packing, activations_of, target_of
from tersor.ops import grouped, mixed_launch, mode, outlier_sums, serve_attention
from tersor.ops.attention_form import AttentionForm
from tersor.ops.dispatch import overflow_reason
from tersor.ops.fold import takes_norm
from tersor.ops.gates import Gate
from tersor.ops.norm import TARGETS, channels_fit
from tersor.ops.router import router_of

_NAMES = {**TARGETS, torch.float32: "float32"}

RowSets: TypeAlias = Sequence[tuple[Packing, tuple[int, int, int]]]
"""Packing and shape (E, OC, IC) of the row sets of the weights of a layer's experts: one, or one for each level."""


def linear(
    weight: PackedWeight,
    dtype: torch.dtype,
    gate: int,
    tokens: int,
    chip: Chip,
    norms: Collection[Norm] = (Norm.NONE,),
) -> Iterator[KernelSource]:
    """Yield the kernels of `ops.linear`, or of `ops.gated_linear`, with up to `tokens` tokens.

    Args:
        weight: as it lies on the GPU; no number of it is read.
        dtype: of activations.
        gate: how gate and up become one, or 0.
        tokens: at least 1.
        chip: the GPU.
        norms: what calls of few tokens have of the norms around them (`ops.linear_norm_out`, `ops.linear_norm_in`).
    """
    few = tune.MOST_NORMED if Norm.NONE not in norms else 0
    if weight.scheme.outliers is not None:
        added, whole = outlier_sums.sources(weight, dtype, tokens, chip)
        yield from added
        weight, gate = weight.dense, 0
        if whole:
            return
    yield from _matrix(weight.scheme, weight.layout, weight.shape, dtype, gate, tokens, chip, few)
    for norm in set(norms) - {Norm.NONE}:
        packing = Packing.beside(Activations.NATIVE, dtype, weight.scheme)
        for n in range(1, min(tokens, tune.MOST_NORMED) + 1):
            config = tune.choose_normed(tune.LinearProblem.of(packing, weight.shape, n), chip)
            if config is not None:
                yield dense.fused_source(packing, TARGETS[dtype], config, gate, norm)


def mixed_linear(weight: MixedWeight, dtype: torch.dtype, gate: int, tokens: int, chip: Chip) -> Iterator[KernelSource]:
    """Yield the kernels of `ops.linear`, or of `ops.gated_linear`, of a mixed weight with up to `tokens` tokens.

    Args:
        weight: as it lies on the GPU; no number of it is read.
        dtype: of activations.
        gate: how gate and up become one, or 0.
        tokens: at least 1.
        chip: the GPU.
    """
    now, result = mode.current(), target_of(Activations.NATIVE, dtype)
    if result is None or now.reference:
        return
    layout = mixed_launch.layout_of(weight)
    if now.batch_invariant or mixed_launch.reason(weight.mix, layout, weight.shape[1], dtype, chip):
        for one in weight.sets:  # each is multiplied as the dense weight that it is
            yield from _matrix(one.scheme, one.layout, one.shape, dtype, gate, tokens, chip)
        return
    packings, problem = mixed_launch.problem_of(weight, layout, tokens)
    if problem.activations is not Activations.NATIVE:
        yield quantizing.quantize_source(result, problem.activations)
    for tile in tune_mixed.asked(problem, chip):
        yield mixed.source(packings, result, tile, chip, gate)


def folds_norm(first: PackedWeight, second: PackedWeight, dtype: torch.dtype, chip: Chip) -> bool:
    """Tell whether a norm between two products is a part of them in calls of few tokens, as `ops.folds_norm` does."""
    sides = ((first, Norm.OUT), (second, Norm.IN))
    return (
        mode.current().fold_norms and chip.capability == (9, 0) and all(takes_norm(w, dtype, side) for w, side in sides)
    )


def _matrix(
    scheme: Scheme,
    layout: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    gate: int,
    tokens: int,
    chip: Chip,
    beyond: int = 0,
) -> Iterator[KernelSource]:
    result, now = target_of(Activations.NATIVE, dtype), mode.current()
    if layout == STREAM or result is None or now.reference:
        return
    activations = activations_of(layout)
    native = activations is Activations.NATIVE
    if not native and (chip.capability != (9, 0) or overflow_reason(scheme, layout, shape[1])):
        return
    packing = Packing.beside(activations, dtype, scheme)
    problem = tune.LinearProblem.of(
        packing,
        shape,
        tokens,
        aligned=not native or shape[1] % 8 == 0,
        activations=activations,
        batch_invariant=now.batch_invariant,
    )
    if native:
        problem = tune.launched(problem, chip)
    if not tune.fused(problem, chip):
        problem = replace(problem, n=sm80.TOKENS)
        yield from (dense.dequantize_source(packing), dense.epilogue_source(packing, gate))
    if not native:
        yield quantizing.quantize_source(result, activations)
    for config in tune.choices(problem, chip, beyond):
        yield dense.fused_source(packing, result, config, gate)


def experts_of(
    gate_up: Stacked,
    down: Stacked,
    choice: Choice,
    gate: Gate,
    dtype: torch.dtype,
    logits: torch.dtype,
    tokens: int,
    chip: Chip,
) -> Iterator[KernelSource]:
    """Yield the kernels of `ops.routed_experts` with up to `tokens` tokens.

    Args:
        gate_up, down: as they lie on the GPU; no number of them is read.
        choice: how experts are chosen.
        gate: how gate and up become one.
        dtype, logits: dtypes of activations and of the router's logits.
        tokens: at least 1.
        chip: the GPU.
    """
    yield from route(choice, logits)
    if experts_misfit(gate_up, down, dtype, chip):
        for of, ending in ((gate_up, int(gate)), (down, 0)):
            for weight in sets_of(of):
                yield from _matrix(weight.scheme, weight.layout, weight.matrix, dtype, ending, tokens, chip)
        return
    yield from combine(dtype)
    ups, downs = (tuple((one.packing, one.shape) for one in sets_of(weight)) for weight in (gate_up, down))
    yield from products(ups, downs, choice.top_k, gate, TARGETS[dtype], tokens, chip)


def experts_misfit(gate_up: Stacked, down: Stacked, dtype: torch.dtype, chip: Chip) -> bool:
    """Tell whether no kernel takes all experts of a layer at once."""
    return dtype not in TARGETS or bool(grouped.misfit(gate_up, down, dtype, chip))


def products(
    ups: RowSets, downs: RowSets, top_k: int, gate: Gate, result: str, tokens: int, chip: Chip
) -> Iterator[KernelSource]:
    """Yield the kernels of the two products of all experts, and what goes ahead of them.

    Args:
        ups, downs: packing and shape (E, OC, IC) of every row set of gate and up, and of down.
        top_k: experts of a token.
        gate: how gate and up become one.
        result: dtype of activations as they come: `float16` or `bfloat16`.
        tokens: up to so many.
        chip: the GPU.
    """
    invariant = mode.current().batch_invariant
    of_up, of_down = (
        tuple(
            tune_experts.ExpertsProblem.of(packing, shape, tokens, top_k, activations_of(packing.layout), invariant)
            for packing, shape in sets
        )
        for sets in (ups, downs)
    )
    kinds = {one.activations for one in (*of_up, *of_down)} - {Activations.NATIVE}
    for kind in sorted(kinds, key=lambda kind: kind.name):
        yield quantizing.quantize_source(result, kind)
    for firsts, seconds in tune_experts.choices_of_sets(of_up, of_down, chip):
        if any(first.activations is Activations.NATIVE and not first.gathers for first in firsts):
            yield experts.gather_source()
        for sets, problems, configs, ending, ready in (
            (ups, of_up, firsts, int(gate), False),
            (downs, of_down, seconds, 0, not kinds),
        ):
            packings = tuple(packing for packing, _ in sets)
            if tune_experts.together(problems, chip):
                whole = tuple(one for one in configs if isinstance(one, tune_experts.ExpertsConfig))
                native = whole[0].activations is Activations.NATIVE
                yield mixed.experts_source(packings, result, whole, ending, ready and native)
                continue
            for packing, config in zip(packings, configs, strict=True):
                yield experts.source(packing, result, config, ending, ready)


def route(choice: Choice, logits: torch.dtype) -> Iterator[KernelSource]:
    """Yield the kernel that chooses experts by logits of a dtype."""
    if choice.fits() and logits in _NAMES:
        yield routing.route_source(choice, _NAMES[logits])


def tables(experts: int) -> Iterator[KernelSource]:
    """Yield the kernel that sorts tokens by experts that were chosen apart, where so many of them are here."""
    if experts <= routing.MOST_EXPERTS:
        yield routing.tables_source(experts, "int32")


def combine(dtype: torch.dtype) -> Iterator[KernelSource]:
    """Yield the kernel that adds up what the experts of a token gave."""
    if dtype in TARGETS:
        yield routing.combine_source(TARGETS[dtype])


def attention(
    form: AttentionForm, dtype: torch.dtype, pages: torch.dtype, rows: int, queries: int, length: int, chip: Chip
) -> Iterator[KernelSource]:
    """Yield the kernels of `ops.attend`.

    Args:
        form: of the layer.
        dtype, pages: dtypes of activations, and of keys and values.
        rows: of a step at most.
        queries: new tokens of a row at most.
        length: tokens of a text at most, whole pages.
        chip: the GPU.
    """
    if dtype not in TARGETS or serve_attention.misfit(form, dtype, pages):
        return
    kind = attention_kernels.Kind(head_dim=form.head_dim, dtype=TARGETS[dtype], e4m3=pages != dtype)
    few, of_token = attention_kernels.FEW_QUERIES, form.heads // form.kv_heads
    invariant = mode.current().batch_invariant
    shares = serve_attention.shares(form, length) and not invariant
    counts = [few] if invariant else range(1, min(queries, few) + 1)
    for tiles in sorted({kind.query_tiles(count * of_token) for count in counts}):
        crowds = {False, decode_attention.is_crowded(kind, rows, form.kv_heads, invariant, chip.sms)}
        yield from dict.fromkeys(decode_attention.decode_source(kind, tiles, chip, crowded=one) for one in crowds)
        if shares:
            yield decode_attention.decode_source(kind, tiles, chip, shares=True)
    if shares:
        yield shared_attention.shared_source(kind, chip)
    if queries > few:
        yield attention_kernels.append_source(kind)
        family = attention_sm90 if attention_sm90.takes(kind, chip) else attention_kernels
        yield family.prefill_source(kind, chip)


def router(
    weight: torch.Tensor, dtype: torch.dtype, wide: bool, tokens: int, beyond: int = 0
) -> Iterator[KernelSource]:
    """Yield the kernels of `ops.router_logits` with up to `tokens` tokens.

    Args:
        weight: [E, H]; no number of it is read.
        dtype: of activations.
        wide: whether logits are float32.
        tokens: at least 1.
        beyond: calls of up to so many tokens are not made.
    """
    experts, channels = weight.shape
    if dtype in TARGETS and experts and channels_fit(channels, routing.MOST_ROUTER_CHANNELS):
        kind = router_of(dtype, weight.dtype, wide, channels)
        counts = range(beyond + 1, min(tokens, routing.ROUTER_TOKENS) + 1)
        yield from dict.fromkeys(routing.router_source(kind, n) for n in counts)


def decide(
    weight: torch.Tensor, dtype: torch.dtype, wide: bool, choice: Choice, norms: bool, tokens: int
) -> Iterator[KernelSource]:
    """Yield the kernels of `ops.decide` with up to `tokens` tokens.

    Args:
        weight, dtype, wide: as for `router`.
        choice: how experts are chosen.
        norms: whether rows are normed first.
        tokens: at least 1.
    """
    if dtype not in TARGETS or not channels_fit(weight.shape[1], routing.MOST_ROUTER_CHANNELS):
        return
    kind = router_of(dtype, weight.dtype, wide, weight.shape[1])
    decider = deciding.Decider(router=kind, choice=choice, norms=norms)
    counts = (n for n in range(1, min(tokens, deciding.MOST_TOKENS) + 1) if decider.fits(n))
    yield from dict.fromkeys(deciding.source(decider, n) for n in counts)


def decided_sum(channels: int, dtype: torch.dtype) -> Iterator[KernelSource]:
    """Yield the kernel of `ops.decided_experts` that adds up and norms, of rows of so many channels."""
    if dtype in TARGETS and channels_fit(channels, deciding.MOST_SUMMED_CHANNELS):
        yield deciding.combine_source(TARGETS[dtype], channels)


def draws(vocabulary: int, dtype: torch.dtype) -> Iterator[KernelSource]:
    """Yield the kernels that draw tokens by logits of a dtype, and find log probabilities."""
    if vocabulary <= sampling.MOST_VOCABULARY:
        yield from sampling.sources(_NAMES[dtype])
