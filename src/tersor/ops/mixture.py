"""The experts of a layer: every token through those that its router chose, their outputs weighted and added.

`experts` takes what was chosen, `routed_experts` a router's logits. Both are served by kernels that take all experts at
once (`ops.grouped`) where there are such, else an expert at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from tersor.errors import ShapeError
from tersor.formats import Scheme
from tersor.layouts import Stacked, StackedWeight
from tersor.layouts.gated import gated_channels
from tersor.ops import autocast, current, dense, gradient, grouped, multiply, routing, serve_routing, stacks
from tersor.ops.gates import Gate
from tersor.ops.tables import Tables

_ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The weights of a layer's experts and what is added to their sums, as in `experts`."""

    gate_up: Stacked
    down: Stacked
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    gate: Gate


_library = torch.library.Library("tersor", "FRAGMENT")
_WEIGHT = "Tensor {0}_data, Tensor {0}_scale, Tensor? {0}_zero_point, str {0}_scheme, int[] {0}_shape, str {0}_layout"
_library.define(
    f"experts(Tensor x, Tensor index, Tensor weights, {_WEIGHT.format('gate_up')}, {_WEIGHT.format('down')}, "
    "Tensor? gate_up_bias, Tensor? down_bias, Tensor? addend, int gate) -> Tensor"
)
_library.define(
    "experts_mixed(Tensor x, Tensor index, Tensor weights, Tensor[] gate_up, str gate_up_form, Tensor[] down, "
    "str down_form, Tensor? gate_up_bias, Tensor? down_bias, Tensor? addend, int gate) -> Tensor"
)


def experts(
    x: torch.Tensor,
    gate_up: Stacked,
    down: Stacked,
    index: torch.Tensor,
    weights: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    gate: Gate = Gate.SILU,
) -> torch.Tensor:
    """Run every token through its experts: y[t] = sum over k of weights[t, k] * D_e(gate(GU_e(x[t]))), e = index[t, k].

    GU_e(x) is x @ W^T + bias of expert e's gate and up, interleaved, D_e that of its down projection. Sums are float32;
    what passes from one to the other, and kernels' D_e, are rounded to x's dtype. x, weights, biases and addend have
    gradients.

    Args:
        x: [T, H], float16, bfloat16, float32 or float64.
        gate_up: [E, gated_rows(F), H], as `StackedWeight.gate_up` makes it or a stack of `MixedWeight.gate_up`, on x's
            device, in any layout.
        down: [E, H, F], likewise.
        index: [T, K] int32 or int64, the experts of each token; a number that is no expert contributes nothing.
        weights: [T, K], any float dtype, what the outputs of the experts are multiplied by.
        gate_up_bias: [E, gated_rows(F)] in x's dtype, interleaved likewise (`layouts.gated.interleave`), or `None`.
        down_bias: [E, H] in x's dtype, or `None`.
        addend: [T, H] in x's dtype, such as the output of a shared expert, added before the last rounding, or `None`.
        gate: how gate and up become one.

    Returns:
        [T, H] in x's dtype.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit; the message names both sides.
    """
    x, gate_up_bias, down_bias, addend = _cast(x, gate_up_bias, down_bias, addend)
    layer = _Layer(gate_up, down, gate_up_bias, down_bias, gate)
    _check(x, layer, addend)
    _check_choice(x, index, weights)
    floats = (x, weights, gate_up_bias, down_bias, addend)
    if gradient.wanted(*floats):
        return _one_by_one(x, layer, index, weights, addend)
    if dense.looked_at(*floats):
        rest = (gate_up_bias, down_bias, addend, int(gate))
        if isinstance(gate_up, StackedWeight) and isinstance(down, StackedWeight):
            return _operator(x, index, weights, *_described(gate_up), *_described(down), *rest)
        return _mixed_operator(x, index, weights, *stacks.tensors_of(gate_up), *stacks.tensors_of(down), *rest)
    return _serve(x, layer, index, weights, addend)


def routed_experts(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: Stacked,
    down: Stacked,
    top_k: int,
    *,
    scoring: str = "softmax",
    normalize: bool = True,
    choice_bias: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    gate: Gate = Gate.SILU,
) -> torch.Tensor:
    """Run every token through the experts that a router's logits choose: `route`, then `experts`, in as few launches.

    Args:
        x, gate_up, down, gate_up_bias, down_bias, addend, gate: as in `experts`.
        logits, top_k, scoring, normalize, groups, top_groups, scale: as in `route`.
        choice_bias: the `bias` of `route`.

    Returns:
        [T, H] in x's dtype.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit.
    """
    x, gate_up_bias, down_bias, addend = _cast(x, gate_up_bias, down_bias, addend)
    options: _Choice = {"scoring": scoring, "normalize": normalize, "bias": choice_bias}
    options |= {"groups": groups, "top_groups": top_groups, "scale": scale}
    layer = _Layer(gate_up, down, gate_up_bias, down_bias, gate)
    _check(x, layer, addend)
    _check_logits(x, layer, logits, top_k)
    if not dense.looked_at(x, logits, gate_up_bias, down_bias, addend) and x.numel():
        with _on_device(x):
            chosen = grouped.prepared(x, gate_up, down, top_k, gate)
            if chosen is not None:
                index, weights, tables = routing.route_tables(logits, top_k, chosen.block_tokens, **options)
                y = _products(x, layer, tables, top_k, chosen)
                return serve_routing.combine(y, weights, tables, addend, ready=True)
    index, weights = routing.route(logits, top_k, **options)
    return experts(
        *(x, gate_up, down, index, weights), gate_up_bias=gate_up_bias, down_bias=down_bias, addend=addend, gate=gate
    )


class _Choice(TypedDict, total=False):
    """How `route` chooses."""

    scoring: str
    normalize: bool
    bias: torch.Tensor | None
    groups: int
    top_groups: int
    scale: float


def _cast(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, ...]:
    """Return activations, and what is added to them, in the dtype that torch.autocast asks for."""
    if not autocast.enabled():
        return (x, *others)
    dtype = autocast.activation_dtype(x)
    return (x.to(dtype), *(None if other is None else other.to(dtype) for other in others))


def _on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Make a tensor's device the current one."""
    index = x.get_device()
    return nullcontext() if index < 0 or current.device() == index else torch.cuda.device(index)


def _serve(
    x: torch.Tensor,
    layer: _Layer,
    index: torch.Tensor,
    weights: torch.Tensor,
    addend: torch.Tensor | None,
) -> torch.Tensor:
    """Serve a checked call at which nobody looks."""
    top_k = index.shape[1]
    with _on_device(x):
        chosen = grouped.prepared(x, layer.gate_up, layer.down, top_k, layer.gate) if index.numel() else None
        if chosen is None:
            return _one_by_one(x, layer, index, weights, addend)
        weights = weights.to(torch.float32).contiguous()  # ahead of all launches, which follow each other closely
        tables = routing.tables(index, layer.gate_up.experts, chosen.block_tokens)
        y = _products(x, layer, tables, top_k, chosen)
        return serve_routing.combine(y, weights, tables, addend, ready=True)


def _one_by_one(
    x: torch.Tensor,
    layer: _Layer,
    index: torch.Tensor,
    weights: torch.Tensor,
    addend: torch.Tensor | None,
) -> torch.Tensor:
    """Serve a call an expert at a time, by the operators of single weights: on a CPU this is the definition.

    The host learns which tokens an expert gets, so this cannot be captured in a CUDA graph.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.zeros(*index.shape, x.shape[1], dtype=wide, device=x.device)
    for expert, tokens, ranks in pairs_by_expert(index, layer.gate_up.experts):
        inner = _inner(x[tokens], layer, expert)
        outer = multiply.linear(inner if x.is_cuda else inner.to(wide), layer.down.expert(expert)).to(wide)
        if layer.down_bias is not None:
            outer = outer + layer.down_bias[expert].to(wide)
        pairs = pairs.index_put((tokens, ranks), outer)
    total = (pairs * weights.to(wide).unsqueeze(-1)).sum(1)
    return (total if addend is None else total + addend).to(x.dtype)


def pairs_by_expert(index: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield each expert that some token goes to, those tokens, and which of a token's K experts it is to each of them.

    The host waits for the device, once.

    Args:
        index: integers [T, K], the experts of each token; a number that is no expert is left out.
        experts: E.
    """
    chosen = index.reshape(-1)
    chosen = torch.where((chosen < 0) | (chosen >= experts), experts, chosen)
    order, start = chosen.argsort(stable=True), 0
    for expert, count in enumerate(torch.bincount(chosen, minlength=experts)[:experts].tolist()):
        if count:
            pairs = order[start : start + count]
            yield expert, pairs // index.shape[1], pairs % index.shape[1]
            start += count


def _inner(x: torch.Tensor, layer: _Layer, expert: int) -> torch.Tensor:
    """Return gate and up of an expert as one, [N, F] in x's dtype."""
    weight = layer.gate_up.expert(expert)
    bias = None if layer.gate_up_bias is None else layer.gate_up_bias[expert]
    return multiply.gated_linear(x, weight, bias, gate=layer.gate)


def _products(x: torch.Tensor, layer: _Layer, tables: Tables, top_k: int, chosen: grouped.Prepared) -> torch.Tensor:
    """Run every pair through its expert by kernels: returns [P, H] in the order of the tables."""
    biases = (layer.gate_up_bias, layer.down_bias)
    return grouped.products(x, layer.gate_up, layer.down, tables, top_k, *biases, chosen)


def _check(x: torch.Tensor, layer: _Layer, addend: torch.Tensor | None) -> None:
    """Raise ShapeError where the tensors of a call do not fit each other, whatever experts are chosen."""
    gate_up, down = layer.gate_up, layer.down
    count, rows, hidden = gate_up.shape
    inner = gated_channels(rows)
    if down.shape != (count, hidden, inner):
        raise ShapeError(
            f"experts: gate and up are {list(gate_up.shape)}, so down is [{count}, {hidden}, {inner}], and it is "
            f"{list(down.shape)}"
        )
    if x.dim() != 2 or x.shape[1] != hidden or x.dtype not in _ACTIVATION_DTYPES:
        raise ShapeError(
            f"experts: x is {list(x.shape)} {x.dtype}, expected [T, {hidden}] of float16, bfloat16, float32 or float64"
        )
    beside = (
        ("gate_up_bias", layer.gate_up_bias, (count, rows)),
        ("down_bias", layer.down_bias, (count, hidden)),
        ("addend", addend, tuple(x.shape)),
    )
    for name, tensor, shape in beside:
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != x.dtype):
            raise ShapeError(
                f"experts: {name} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {x.dtype}"
            )
    _check_devices(x, gate_up, down, layer.gate_up_bias, layer.down_bias, addend)


def _check_choice(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
    """Raise ShapeError where the experts of tokens, and their weights, are not those of x."""
    if weights.dim() != 2 or weights.shape[0] != x.shape[0] or not weights.is_floating_point():
        found = f"{list(weights.shape)} {weights.dtype}"
        raise ShapeError(f"experts: weights are {found}, expected floats [{x.shape[0]}, K] for {x.shape[0]} tokens")
    if index.shape != weights.shape or index.dtype not in _INDEX_DTYPES:
        found = f"{list(index.shape)} {index.dtype}"
        raise ShapeError(f"experts: index is {found}, expected int32 or int64 {list(weights.shape)} as weights")
    _check_devices(x, index, weights)


def _check_logits(x: torch.Tensor, layer: _Layer, logits: torch.Tensor, top_k: int) -> None:
    """Raise ShapeError where logits are not those of x for the experts of a layer, or not so many can be chosen."""
    expected = (x.shape[0], layer.gate_up.experts)
    if tuple(logits.shape) != expected:
        raise ShapeError(f"experts: logits are {list(logits.shape)}, expected {list(expected)}, tokens and experts")
    if not 1 <= top_k <= expected[1]:
        raise ShapeError(f"experts: top_k is {top_k}, expected 1 to {expected[1]}, the number of experts")
    _check_devices(x, logits)


def _check_devices(x: torch.Tensor, *others: torch.Tensor | Stacked | None) -> None:
    for other in others:
        if other is not None and other.device != x.device:
            raise ShapeError(f"experts: x is on {x.device}, a tensor beside it on {other.device}")


def _described(
    weight: StackedWeight,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str, tuple[int, int, int], str]:
    return weight.data, weight.scale, weight.zero_point, weight.scheme.key(), weight.shape, weight.layout


def _weight(
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: str,
    shape: list[int],
    layout: str,
) -> StackedWeight:
    experts, oc, ic = shape
    return StackedWeight(Scheme.from_key(scheme), (experts, oc, ic), data, scale, zero_point, layout)


def _mixed_served(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *rest: Any) -> torch.Tensor:
    gate_up, down = stacks.weight_of(*rest[:2]), stacks.weight_of(*rest[2:4])
    return _whole(x, index, weights, gate_up, down, *rest[4:])


def _served(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _whole(x, index, weights, _weight(*rest[:6]), _weight(*rest[6:12]), *rest[12:])


def _whole(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Stacked,
    down: Stacked,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    layer = _Layer(gate_up, down, gate_up_bias, down_bias, Gate(gate))
    _check(x, layer, addend)
    _check_choice(x, index, weights)
    return _serve(x, layer, index, weights, addend)


def _shape_only(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_operator, _mixed_operator = torch.ops.tersor.experts.default, torch.ops.tersor.experts_mixed.default
for _name, _one, _function in (("experts", _operator, _served), ("experts_mixed", _mixed_operator, _mixed_served)):
    for _device in autocast.DEVICES:
        _library.impl(_name, _function, _device)
        _library.impl(_name, autocast.ignoring(_one), f"Autocast{_device}")
    torch.library.register_fake(f"tersor::{_name}", _shape_only, lib=_library)
