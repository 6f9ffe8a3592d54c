"""Where does an RMS norm go that has no kernel? Into the products around it, where a step has few tokens.

With weights g and r = 1 / sqrt(mean(y^2) + eps) of a token, W (y * g * r) = r * (W (y * g)): the product ahead, whose
result y is (`linear_norm_out`), multiplies by g while it rounds, and adds up y^2 over the channels that a CTA has; the
product behind (`linear_norm_in`) multiplies its float32 sums by r. The torch code here is the definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from tersor.errors import ShapeError
from tersor.kernels.dense import SQUARED_CHANNELS, Norm, squares_stride
from tersor.kernels.tune import MOST_NORMED
from tersor.layouts import PackedWeight
from tersor.layouts.gated import gated_channels
from tersor.layouts.packing import LAYOUTS
from tersor.ops import current, dense, mode, multiply, prepared, serve, tensors
from tersor.ops.norm import TARGETS
from tersor.ops.prepared import Prepared

_ALIGNED_CHANNELS = 8
"""Rows that go from product to product have a multiple of so many channels."""


@dataclass(frozen=True, slots=True)
class FoldedNorm:
    """An RMS norm of H channels, as the products around it take it.

    Attributes:
        weight: float32 [H]: weights + offset, times the power of two that brings the largest below 1, so that what is
            multiplied by them never overflows.
        scale, eps: r = 1 / sqrt(sum of squares * scale + eps), with the inverse of that power in it.
    """

    weight: torch.Tensor
    scale: float
    eps: float

    @staticmethod
    def of(weight: torch.Tensor, eps: float, offset: float = 0.0) -> FoldedNorm:
        """Return the norm of `ops.rms_norm` with these weights [H], which the host reads once."""
        wide = weight.float() + offset
        largest = float(wide.abs().max()) if len(wide) else 0.0
        exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
        power = math.ldexp(1.0, -exponent)
        return FoldedNorm(wide * power, power * power / max(len(wide), 1), eps * power * power)


@dataclass(frozen=True, slots=True)
class Deferred:
    """Rows of a norm whose division is left to the product behind it.

    Attributes:
        x: [T, H], before the norm: what residuals are.
        scaled: [T, H] in the same dtype, x times `norm.weight`.
        squares: float32 [T, ceil(H / 64)], sums of squares of x over every 64 channels; rows start on 16 bytes.
        norm: the norm.
    """

    x: torch.Tensor
    scaled: torch.Tensor
    squares: torch.Tensor
    norm: FoldedNorm

    @property
    def factors(self) -> torch.Tensor:
        """What the products of each token are still to be multiplied by, float32 [T, 1]."""
        return torch.rsqrt(self.squares.sum(-1, keepdim=True) * self.norm.scale + self.norm.eps)


def folds_norm(x: torch.Tensor, first: PackedWeight, second: PackedWeight, gate: int = 0) -> bool:
    """Tell whether kernels have the norm between two products in them, in the current mode.

    Args:
        x: activations [T, IC] of the first product.
        first, second: weights of the products.
        gate: how the second, `ops.gated_linear`, ends, or 0.
    """
    if x.shape[0] > MOST_NORMED:
        return False
    seen = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
    if seen or not mode.current().fold_norms:
        return False
    sides = ((first, 0, Norm.OUT), (second, gate, Norm.IN))
    return all(_prepared(x, *side) is not None for side in sides)


def takes_norm(weight: PackedWeight, dtype: torch.dtype, norm: Norm) -> bool:
    """Tell whether the sm90 schedule's kernels of few tokens can have a norm in them, in the current mode.

    Args:
        weight: of the product.
        dtype: of activations.
        norm: on which side.
    """
    if weight.outliers is not None:
        return False
    if mode.current().batch_invariant or dtype not in TARGETS or LAYOUTS.get(weight.layout) != TARGETS[dtype]:
        return False
    return not any(size % _ALIGNED_CHANNELS for size in (weight.shape if norm is Norm.OUT else weight.shape[1:]))


def linear_norm_out(
    x: torch.Tensor,
    weight: PackedWeight,
    norm: FoldedNorm,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> Deferred:
    """Return `ops.linear`, and of the norm behind it all but the division. It has no gradient.

    Args:
        x: [T, IC] float16, bfloat16 or float32.
        weight, bias, residual: as for `ops.linear`; residual is [T, OC].
        norm: of OC channels.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit; the message names both sides.
    """
    of, oc = prepared.type_of(weight), weight.shape[0]
    _check("linear_norm_out", x, norm, oc)
    serve.check(x, x.shape, weight.data, bias, of, residual, oc)
    index, stride, summed = x.get_device(), squares_stride(oc), -(-oc // SQUARED_CHANNELS)
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return linear_norm_out(x, weight, norm, bias, residual=residual)
    chosen = _prepared(x, weight, 0, Norm.OUT)
    if chosen is None:
        y = multiply.linear(x, weight, bias, residual=residual)
        wide = y.float()
        padded = functional.pad(wide.square(), (0, stride * SQUARED_CHANNELS - oc))
        squares = padded.unflatten(-1, (stride, SQUARED_CHANNELS)).sum(-1)
        return Deferred(y, (wide * norm.weight).to(y.dtype), squares[:, :summed], norm)
    n = len(x)
    scaled = current.empty((n, oc), (oc, 1), x.dtype)
    squares = current.empty((n, stride), (stride, 1), torch.float32)
    addresses = {"norm_weight": norm.weight.data_ptr(), "scaled": scaled.data_ptr(), "squares": squares.data_ptr()}
    y = _launched(chosen, x, weight, bias, residual, oc, **addresses)
    return Deferred(y, scaled, squares[:, :summed], norm)


def linear_norm_in(
    rows: Deferred, weight: PackedWeight, bias: torch.Tensor | None = None, *, gate: int = 0
) -> torch.Tensor:
    """Return `ops.linear` of the norm's result or, with a gate, `ops.gated_linear` of it.

    Args:
        rows: what the product ahead returned.
        weight, bias: as for `ops.linear` or `ops.gated_linear`.
        gate: how gate and up become one, a `Gate`, or 0.

    Returns:
        [T, OC] in the rows' dtype, or [T, F] with a gate.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit; the message names both sides.
    """
    of, x, (oc, ic) = prepared.type_of(weight), rows.scaled, weight.shape
    outputs = gated_channels(oc) if gate else oc
    _check("linear_norm_in", x, rows.norm, ic)
    serve.check(x, x.shape, weight.data, bias, of, None, outputs)
    index = x.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return linear_norm_in(rows, weight, bias, gate=gate)
    chosen = _prepared(x, weight, gate, Norm.IN)
    if chosen is None:
        wide, wide_bias = x.float() * rows.factors, None if bias is None else bias.float()
        return dense.multiply(wide, weight, wide_bias, None, gate).to(x.dtype)
    norms = {"squares": rows.squares.data_ptr(), "norm_scale": rows.norm.scale, "norm_eps": rows.norm.eps}
    return _launched(chosen, x, weight, bias, None, outputs, **norms)


def _check(name: str, x: torch.Tensor, norm: FoldedNorm, channels: int) -> None:
    if x.dim() != 2 or x.dtype not in (*TARGETS, torch.float32):
        raise ShapeError(f"{name}: x is {list(x.shape)} {x.dtype}, expected [T, IC] in float16, bfloat16 or float32")
    if norm.weight.shape != (channels,) or norm.weight.device != x.device:
        raise ShapeError(
            f"{name}: the norm is of {list(norm.weight.shape)} channels on {norm.weight.device}, expected [{channels}] "
            f"on {x.device}"
        )


def _prepared(x: torch.Tensor, weight: PackedWeight, gate: int, norm: Norm) -> Prepared | None:
    """Return the prepared call of a kernel with a norm in it, or `None` where the torch code serves."""
    now, n = mode.current(), len(x)
    if not 0 < n <= MOST_NORMED or not takes_norm(weight, x.dtype, norm):
        return None
    key = (n, x.dtype, x.get_device(), True, gate, prepared.mode_key(now, norm))
    chosen = prepared.type_of(weight).prepared(key, now)
    return chosen if chosen.launch is not None else None


def _launched(
    chosen: Prepared,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    outputs: int,
    **norms: float,
) -> torch.Tensor:
    """Launch on the current device, that of x, and return y [T, outputs]; `norms` are arguments of the launch."""
    n, ic = x.shape
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = tensors.aligned_rows(x, ic)
    y = current.empty((n, outputs), (outputs, 1), x.dtype)
    return serve.launched(chosen, weight, bias, residual, y, x=x.data_ptr(), x_stride=ic, x_scale=0, **norms)
