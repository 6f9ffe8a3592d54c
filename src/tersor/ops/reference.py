"""The definition of a packed linear: decode a block of rows, multiply in float32, apply the next block.

Beside int8 activations, sums of a row with one scale are exact: whole numbers, of which a float32 is made once. So are
those of codes in groups that kernels decode to such rows (`layouts.ratios`).

It serves every scheme on every device, and is what the kernels are tested against. Memory beyond the operands is
bounded by one block of decoded weights and the float32 activations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tersor.formats import Activations, scale_values
from tersor.layouts import STREAM, PackedWeight, ratios
from tersor.layouts.blocks import UNIT_OC
from tersor.layouts.gated import HALF, gated_channels
from tersor.layouts.packing import activations_of
from tersor.ops.gates import Gate

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Decoded weights at a time: on a CPU about what its cache holds."""
_EXACT = 1024
"""Channels whose products of int8 float32 certainly holds every sum of."""


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    gate: int = 0,
    one_by_one: bool = False,
) -> torch.Tensor:
    """Return x @ W^T + bias + residual, accumulated in float32 (float64 for such x) and rounded once to x's dtype.

    Args:
        x: [N, IC], any float dtype; first quantised to bytes where the weight lies in the layout for that.
        weight: packed weight [OC, IC] in any layout.
        bias: [OC] or `None`.
        residual: as the result, or `None`.
        gate: a `Gate` where the weight is `PackedWeight.gate_up`: how gate and up of x @ W^T + bias become one; or 0.
        one_by_one: multiply each token on its own: a library's product may sum differently for other numbers of tokens.

    Returns:
        [N, OC] in x's dtype, or [N, F] with a gate.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    activations = activations_of(weight.layout)
    if activations is not Activations.NATIVE:
        codes, token_scale = activations.quantize(wide.to(torch.float32))
        return of_codes(codes, token_scale, x.dtype, weight, bias, residual, gate, one_by_one)
    return _blocks(wide, None, x.dtype, weight, bias, residual, gate, one_by_one)


def of_codes(
    codes: torch.Tensor,
    token_scale: torch.Tensor,
    dtype: torch.dtype,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    gate: int = 0,
    one_by_one: bool = False,
) -> torch.Tensor:
    """Return what `linear` does of activations that were quantised before.

    Args:
        codes: float8_e4m3fn or int8 [N, IC].
        token_scale: float32 [N, 1], or [N, `Activations.scales(IC)`] where the weight lies in the layout for that.
        dtype: of the result.
        weight, bias, residual, gate, one_by_one: as for `linear`.
    """
    activations = activations_of(weight.layout)
    if activations.group_size is not None:
        wide = activations.dequantize(codes, token_scale)
        return _blocks(wide, None, dtype, weight, bias, residual, gate, one_by_one)
    whole = codes.dtype == torch.int8 and weight.packing.sums_in_block == 0
    return _blocks(codes.to(torch.float32), token_scale, dtype, weight, bias, residual, gate, one_by_one, whole)


def _blocks(
    wide: torch.Tensor,
    token_scale: torch.Tensor | None,
    dtype: torch.dtype,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: int,
    one_by_one: bool,
    whole: bool = False,
) -> torch.Tensor:
    """Return the product of wide activations [N, IC], each token times its scale [N, 1], a block of rows at a time.

    With `whole` activations and weights are whole numbers but for scales.
    """
    packed = weight if weight.layout == STREAM else weight.to_layout(STREAM)

    def product(first: int, last: int) -> torch.Tensor:
        own = None if bias is None else bias[first:last]
        if whole and token_scale is not None:
            return _whole_product(wide, token_scale, packed.rows(first, last), own)
        block = packed.rows(first, last).dequantize(wide.dtype)
        part = torch.stack([block @ token.clone() for token in wide]) if one_by_one else wide @ block.T
        if token_scale is not None:
            part.mul_(token_scale)
        return part if own is None else part.add_(own)

    return in_blocks(wide, dtype, weight.shape, product, residual, gate)


def in_blocks(
    x: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, int],
    product: Callable[[int, int], torch.Tensor],
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    """Return the result of a product that is made of a block of rows of the weight at a time, rounded once.

    Args:
        x: activations [N, IC].
        dtype: of the result.
        shape: (OC, IC) of the weight.
        product: returns x times rows first .. last - 1 with their bias, wide: [N, rows]; it is overwritten.
        residual, gate: as for `linear`.
    """
    oc, ic = shape
    output = x.new_empty(x.shape[0], gated_channels(oc) if gate else oc, dtype=dtype)
    unit = 2 * HALF if gate else 1
    rows = max(1, BLOCK_ELEMENTS.get(x.device.type, 1 << 18) // max(ic, 1) // unit) * unit
    start = 0
    for first in range(0, oc, rows):
        part = product(first, min(first + rows, oc))
        if gate:
            part = Gate(gate).of_rows(part)
        end = start + part.shape[1]
        if residual is not None:
            part += residual[:, start:end]
        output[:, start:end] = part
        start = end
    return output


def _whole_product(
    codes: torch.Tensor, token_scale: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return float32(float32(exact sum) * token scale) * row scale + bias, rounded once more: float32 [N, rows].

    Args:
        codes: whole numbers of at most 127, float32 [N, IC].
        token_scale: float32 [N, 1].
        weight: some rows, in the stored stream, with one scale each or with scales in groups that ratios are made of.
        bias: of those rows, or `None`.
    """
    scale, zero_point = weight.stored_scales()
    if weight.scheme.group_size is not None:
        numbers, row_scale = ratios.whole_numbers(weight.codes(), scale, zero_point, weight.scheme)
    else:
        numbers, row_scale = weight.scheme.format.decode(weight.codes()), scale_values(scale, weight.scheme)
        if zero_point is not None:
            numbers = numbers - zero_point.to(torch.float32)
    sums = codes.new_zeros(len(codes), len(numbers), dtype=torch.float64)
    for first in range(0, codes.shape[1], _EXACT):
        sums += codes[:, first : first + _EXACT] @ numbers[:, first : first + _EXACT].T
    scaled = (sums.to(torch.float32) * token_scale).double() * row_scale.double().T
    return (scaled if bias is None else scaled + bias.double()).to(torch.float32)


def input_grad(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return grad @ W, the gradient of activations, accumulated and rounded as in `linear`.

    Args:
        grad: [N, OC], any float dtype.
        weight: packed weight [OC, IC] in any layout.

    Returns:
        [N, IC] in grad's dtype.
    """
    oc, ic = weight.shape
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    total = wide.new_zeros(grad.shape[0], ic)
    unit = 1 if weight.layout == STREAM else UNIT_OC
    rows = max(1, BLOCK_ELEMENTS.get(grad.device.type, 1 << 18) // max(ic, 1) // unit) * unit
    for first in range(0, oc, rows):
        last = min(first + rows, oc)
        total.addmm_(wide[:, first:last], weight.rows(first, last).dequantize(wide.dtype))
    return total.to(grad.dtype)
