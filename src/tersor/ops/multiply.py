"""Multiply with a packed weight of any type: `linear`, and `gated_linear` for gate and up at once.

The type of the weight says which operator multiplies: `PackedWeight` has `tersor::linear` (`ops.dense`), `MixedWeight`
one such product a row set (`ops.mixed`), `SparseWeight` `tersor::sparse_linear` (`ops.sparse`) and, in kernel tiles, as
`TiledSparseWeight`, `tersor::tiled_sparse_linear` (`ops.tiled_sparse`). Another type of weight comes with an operator
of its own and is entered here with `serve_with`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from tersor.errors import InputError
from tersor.layouts import MixedWeight, PackedWeight, SparseWeight, TiledSparseWeight
from tersor.ops import dense, gradient, mixed, sparse, tiled_sparse
from tersor.ops.gates import Gate


class Multiply(Protocol):
    """Multiplies with weights of one type."""

    def __call__(
        self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
    ) -> torch.Tensor:
        """Return what `linear` returns where `gate` is 0, else what `gated_linear` does with that `Gate`."""
        ...


_multiply: dict[type, Multiply] = {
    PackedWeight: dense.multiply,
    MixedWeight: mixed.multiply,
    SparseWeight: sparse.multiply,
    TiledSparseWeight: tiled_sparse.multiply,
}
"""Type of the weight -> who multiplies with it."""


def serve_with(weight_class: type, multiply: Multiply) -> None:
    """Let `multiply` serve every call whose weight is of a type.

    Raises:
        ValueError: the type has one already.
    """
    if _multiply.setdefault(weight_class, multiply) is not multiply:
        raise ValueError(f"weights of type {weight_class.__name__} are multiplied by {_multiply[weight_class]} already")


def linear(
    x: torch.Tensor,
    weight: PackedWeight | MixedWeight | SparseWeight | TiledSparseWeight,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply activations with a packed weight: y = x @ W^T + bias + residual.

    Sums are float32 and scales are applied to the sums, so the result is at least as exact as a float32 product with
    the decoded weight, rounded once (three exceptions: scales in groups where `explain` says `dequantize + cuBLAS`,
    pruned weights where it is `decompress + cuBLAS`, and many tokens beside outliers (`tune.decodes_beside`): there
    scaled weights are rounded to x's dtype first). x, bias and residual have gradients (`ops.gradient`). Under
    torch.autocast they are cast as `torch.nn.functional.linear` casts them.

    Args:
        x: [..., IC], float16, bfloat16, float32 or float64 (whose sums are float64), any strides.
        weight: packed weight [OC, IC] on x's device, dense, mixed or pruned, in any layout.
        bias: [OC] in x's dtype, or `None`.
        residual: [..., OC] in x's dtype, any strides, or `None`; added in float32 before the one rounding.

    Returns:
        [..., OC] in x's dtype, contiguous.

    Raises:
        InputError: no operator multiplies with weights of this type.
        ShapeError: sizes, dtypes or devices that do not fit; the message names both sides.
    """
    multiply = _multiply.get(type(weight)) or _multiplier(weight)
    return multiply(x, weight, bias, residual, 0)


def gated_linear(
    x: torch.Tensor,
    weight: PackedWeight | MixedWeight | SparseWeight | TiledSparseWeight,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    gate: Gate = Gate.SILU,
) -> torch.Tensor:
    """Multiply with gate and up at once: y = silu(x @ G^T + bias_G) * (x @ U^T + bias_U) + residual.

    Everything but the sums' order is float32 arithmetic, rounded once; otherwise as `linear`. Where someone
    differentiates, gates but silu are those of a linear's result, which is rounded.

    Args:
        x: [..., IC], float16, bfloat16 or float32, any strides.
        weight: `gate_up(gate, up)` of two weights [F, IC] of one type, on x's device, in any layout.
        bias: [rows of the weight] in x's dtype, interleaved in the same way (`layouts.gated.interleave`), or `None`.
        residual: [..., F] in x's dtype, any strides, or `None`.
        gate: what stands in place of silu(gate) * up.

    Returns:
        [..., F] in x's dtype, contiguous.

    Raises:
        InputError: no operator multiplies with weights of this type.
        ShapeError: sizes, dtypes or devices that do not fit, or a weight that cannot be a gated one.
    """
    multiply = _multiply.get(type(weight)) or _multiplier(weight)
    if gate is not Gate.SILU and gradient.wanted(x, bias, residual):
        y = gate.of_rows(multiply(x, weight, bias, None, 0))
        return y if residual is None else y + residual
    return multiply(x, weight, bias, residual, int(gate))


def _multiplier(weight: object) -> Multiply:
    """Return who multiplies with a weight of a derived type, or refuse it."""
    for weight_class in type(weight).__mro__:
        if weight_class in _multiply:
            return _multiply[weight_class]
    known = ", ".join(weight_class.__name__ for weight_class in _multiply)
    raise InputError(f"linear: the weight is a {type(weight).__name__}, expected one of: {known}")
