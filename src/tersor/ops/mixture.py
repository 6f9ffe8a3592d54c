"""The experts of a layer: every token through those that its router chose, their outputs weighted and added."""

from __future__ import annotations

import torch

from tersor.errors import ShapeError
from tersor.layouts import StackedWeight
from tersor.layouts.gated import gated_channels
from tersor.ops import reference
from tersor.ops.gates import Gate

_ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INDEX_DTYPES = (torch.int32, torch.int64)


def experts(
    x: torch.Tensor,
    gate_up: StackedWeight,
    down: StackedWeight,
    index: torch.Tensor,
    weights: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    gate: Gate = Gate.SILU,
) -> torch.Tensor:
    """Run every token through its experts: y[t] = sum over k of weights[t, k] * D_e(gate(GU_e(x[t]))), e = index[t, k].

    GU_e(x) is x @ W^T + bias of expert e's gate and up, interleaved, D_e that of its down projection. Sums are float32;
    what passes from one to the other is rounded to x's dtype.

    Args:
        x: [T, H], float16, bfloat16, float32 or float64.
        gate_up: [E, gated_rows(F), H], as `StackedWeight.gate_up` makes it, on x's device, in any layout.
        down: [E, H, F], likewise.
        index: [T, K] int32 or int64, the experts of each token; a number that is no expert contributes nothing.
        weights: [T, K], any float dtype, what the outputs of the experts are multiplied by.
        gate_up_bias: [E, gated_rows(F)] in x's dtype, interleaved likewise (`layouts.gated.interleave`), or `None`.
        down_bias: [E, H] in x's dtype, or `None`.
        gate: how gate and up become one.

    Returns:
        [T, H] in x's dtype.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit; the message names both sides.
    """
    _check(x, gate_up, down, index, weights, gate_up_bias, down_bias)
    return _reference(x, gate_up, down, index, weights, gate_up_bias, down_bias, gate)


def _check(
    x: torch.Tensor,
    gate_up: StackedWeight,
    down: StackedWeight,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
) -> None:
    """Raise ShapeError where the tensors of a call do not fit each other."""
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
    if index.dim() != 2 or index.shape[0] != x.shape[0] or index.dtype not in _INDEX_DTYPES:
        raise ShapeError(f"experts: index is {list(index.shape)} {index.dtype}, expected [{x.shape[0]}, K] of int32")
    if weights.shape != index.shape or not weights.is_floating_point():
        raise ShapeError(
            f"experts: weights are {list(weights.shape)} {weights.dtype}, expected floats {list(index.shape)} as index"
        )
    for name, bias, width in (("gate_up_bias", gate_up_bias, rows), ("down_bias", down_bias, hidden)):
        if bias is not None and (bias.shape != (count, width) or bias.dtype != x.dtype):
            raise ShapeError(
                f"experts: {name} is {list(bias.shape)} {bias.dtype}, expected [{count}, {width}] {x.dtype}"
            )
    beside = (gate_up.data, down.data, index, weights, gate_up_bias, down_bias)
    for tensor in beside:
        if tensor is not None and tensor.device != x.device:
            raise ShapeError(f"experts: x is on {x.device}, a tensor beside it on {tensor.device}")


def _reference(
    x: torch.Tensor,
    gate_up: StackedWeight,
    down: StackedWeight,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    gate: Gate,
) -> torch.Tensor:
    """Serve a call an expert at a time: the definition that kernels are tested against."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.zeros(*index.shape, x.shape[1], dtype=wide, device=x.device)
    for expert in range(gate_up.experts):
        tokens, ranks = (index == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        inner_bias = None if gate_up_bias is None else gate_up_bias[expert]
        outer_bias = None if down_bias is None else down_bias[expert].to(wide)
        inner = reference.linear(x[tokens], gate_up.expert(expert), inner_bias, gated=True, gate=gate)
        pairs[tokens, ranks] = reference.linear(inner.to(wide), down.expert(expert), outer_bias)
    total = torch.zeros(x.shape, dtype=wide, device=x.device)
    for rank in range(index.shape[1]):
        total.addcmul_(pairs[:, rank], weights[:, rank, None].to(wide))
    return total.to(x.dtype)
