"""Multiply with a mixed weight: all row sets in one launch where a kernel takes them, else one dense product a row set.

An output feature is what `ops.linear` gives for its row in the row set of its level, but for the order in which
products are summed: that is the definition. On compute capability 9.0 one launch makes all of it (`mixed_launch`).
Everywhere else, in batch-invariant mode and where somebody looks on (autograd, torch.compile, a profiler), a row set is
multiplied as the dense weight that it is, and one gather brings features in order; biases and residuals are taken apart
by the same permutation, so that each is added before the one rounding. That is made of operators that dispatch:
gradients, torch.compile and autocast are theirs.
"""

from __future__ import annotations

import torch

from tersor.errors import ShapeError
from tersor.layouts import MixedWeight
from tersor.layouts.gated import interleave, separate
from tersor.ops import dense, mixed_launch


def multiply(
    x: torch.Tensor, weight: MixedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
) -> torch.Tensor:
    """Serve a call of `ops.linear` or `ops.gated_linear`.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit, or a gate for a weight that is not gate and up.
    """
    if gate and not weight.gated:
        raise ShapeError(f"gated_linear: a mixed weight {list(weight.shape)} is not MixedWeight.gate_up of two")
    outputs = weight.channels if gate else weight.shape[0]
    _check(x, weight, bias, residual, outputs)
    if not dense.looked_at(x, bias, residual):
        y = mixed_launch.multiply(x, weight, bias, residual, gate)
        if y is not None:
            return y
    return by_row_sets(x, weight, bias, residual, gate)


def by_row_sets(
    x: torch.Tensor, weight: MixedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
) -> torch.Tensor:
    """Return the product, made of those of the row sets."""
    biases = [None] * len(weight.sets) if bias is None else by_set(weight, bias)
    added: list[torch.Tensor | None] = [None] * len(weight.sets)
    if residual is not None:
        added = [*(weight.by_set(residual) if gate else by_set(weight, residual))]
    parts = [
        dense.multiply(x, one, own_bias, own_residual, gate)
        for one, own_bias, own_residual in zip(weight.sets, biases, added, strict=True)
    ]
    return weight.of_channels(parts) if gate else weight.in_order(parts).contiguous()


def by_set(weight: MixedWeight, values: torch.Tensor) -> list[torch.Tensor]:
    """Return the values [..., OC] of every set's rows; those of gate and up are interleaved in each."""
    if not weight.gated:
        return weight.by_set(values)
    gates, ups = (weight.by_set(half.movedim(0, -1)) for half in separate(values.movedim(-1, 0)))
    pairs = zip(gates, ups, strict=True)
    return [interleave(gate.movedim(-1, 0), up.movedim(-1, 0)).movedim(0, -1) for gate, up in pairs]


def _check(
    x: torch.Tensor, weight: MixedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, outputs: int
) -> None:
    """Raise ShapeError where sizes of a call do not fit; dtypes are those of the products of row sets to check."""
    oc, ic = weight.shape
    if not x.dim() or x.shape[-1] != ic:
        raise ShapeError(f"linear: x has shape {list(x.shape)}, expected [..., {ic}] for a weight [{oc}, {ic}]")
    if bias is not None and bias.shape != (oc,):
        raise ShapeError(f"linear: bias is {list(bias.shape)}, expected [{oc}]")
    if residual is not None and residual.shape != (*x.shape[:-1], outputs):
        raise ShapeError(f"linear: residual is {list(residual.shape)}, expected {[*x.shape[:-1], outputs]}")
