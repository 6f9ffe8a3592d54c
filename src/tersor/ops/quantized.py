"""How do a norm's rows meet products with 8-bit activations? As bytes with a scale a row, made by the norm's kernel.

The definition is two steps, the norm rounded to the activations' dtype and `Activations.quantize`; a kernel that does
both gives the same bits, and a product of what it leaves those of `ops.linear`. All row sets of a mixed weight read the
same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tersor.errors import ShapeError
from tersor.formats import Activations
from tersor.kernels.quantizing import codes_stride, scales_stride
from tersor.layouts import MixedWeight, PackedWeight
from tersor.layouts.gated import gated_channels
from tersor.layouts.packing import activations_of
from tersor.ops import current, dispatch, mixed, mixed_launch, mode, norm, prepared, reference, serve, tensors

_LAYOUTS = (dispatch.E4M3_LAYOUT, dispatch.INT8_LAYOUT, dispatch.INT8_GROUPS_LAYOUT)


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows of activations as e4m3 or int8: row t, or a group of its channels, is about codes times its scale.

    Attributes:
        codes: float8_e4m3fn or int8 [T, H].
        scales: float32 [T], or [T, groups].
        dtype: of the rows before, and of the results of products.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @staticmethod
    def of(x: torch.Tensor, activations: Activations = Activations.E4M3) -> Quantized:
        """Return rows x [T, H] quantised by the torch code."""
        codes, scales = activations.quantize(x.float())
        return Quantized(codes, scales if activations.group_size else scales.view(-1), x.dtype)

    @property
    def shape(self) -> torch.Size:
        """[T, H]."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.codes.device


def common_activations(weights: Iterable[PackedWeight | MixedWeight]) -> Activations:
    """Return what all weights are multiplied with; where that differs, or there are none, activations as they come."""
    ways = {activations_of(one.layout) for weight in weights for one in _sets_of(weight)}
    return ways.pop() if len(ways) == 1 else Activations.NATIVE


def _sets_of(weight: PackedWeight | MixedWeight) -> tuple[PackedWeight, ...]:
    """Return the row sets of a mixed weight, or a dense one by itself."""
    return weight.sets if isinstance(weight, MixedWeight) else (weight,)


def takes_quantized(
    x: torch.Tensor,
    weights: Iterable[PackedWeight | MixedWeight],
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None = None,
) -> Activations | None:
    """Return what a kernel makes of rows in their norm where all products of them take that, in the current mode.

    Args:
        x: [T, H], before the norm.
        weights: of all that reads the norm's result.
        norm_weight, norm_bias: of the norm.

    Returns:
        `None` where none does.
    """
    activations = common_activations(weights)
    bytewise = activations is not Activations.NATIVE
    return activations if bytewise and _serves(x, norm_weight, norm_bias) else None


def _serves(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Tell whether a kernel makes bytes of rows in their norm."""
    chip = norm.serving_chip(x, *others)
    return chip is not None and chip.capability == (9, 0)


def rms_norm_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    activations: Activations = Activations.E4M3,
) -> Quantized:
    """Return `ops.rms_norm` of every row as bytes; other arguments and errors are those there. It has no gradient.

    Args:
        x, weight, eps, offset, residual: as there.
        activations: what kind of bytes.
    """
    norm.check("rms_norm_quantized", x, weight=(weight, x.shape[1:]), residual=(residual, x.shape))
    if _serves(x, weight, residual):
        return _quantized(x, norm.launched(x, weight, None, residual, eps, offset, activations=activations))
    return Quantized.of(norm.rms_norm(x, weight, eps, offset=offset, residual=residual), activations)


def layer_norm_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    activations: Activations = Activations.E4M3,
) -> Quantized:
    """Return `ops.layer_norm` of every row as bytes; other arguments and errors are those there. It has no gradient.

    Args:
        x, weight, bias, eps: as there.
        activations: what kind of bytes.
    """
    norm.check("layer_norm_quantized", x, weight=(weight, x.shape[1:]), bias=(bias, x.shape[1:]))
    if _serves(x, weight, bias):
        return _quantized(x, norm.launched(x, weight, bias, None, eps, 0.0, layer=True, activations=activations))
    return Quantized.of(norm.layer_norm(x, weight, bias, eps), activations)


def _quantized(x: torch.Tensor, made: tuple[torch.Tensor, torch.Tensor | None]) -> Quantized:
    codes, scales = made
    assert scales is not None
    return Quantized(codes, scales, x.dtype)


def linear_quantized(
    rows: Quantized,
    weight: PackedWeight | MixedWeight,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    gate: int = 0,
) -> torch.Tensor:
    """Return `ops.linear` or, with a gate, `ops.gated_linear` of rows that are quantised. It has no gradient.

    Args:
        rows: of the activations.
        weight: in the layout for activations like the rows'; of a mixed one all row sets are.
        bias, residual: as for `ops.linear` or `ops.gated_linear`; residual is [T, outputs].
        gate: how gate and up become one, a `Gate`, or 0.

    Returns:
        [T, OC] in the rows' dtype, or [T, F] with a gate.

    Raises:
        ShapeError: sizes, dtypes, devices or a layout that do not fit; the message names both sides.
    """
    for one in _sets_of(weight):
        _check(rows, one.layout)
    if isinstance(weight, MixedWeight):
        outputs = weight.channels if gate else weight.shape[0]
        mixed.check(rows.shape, weight.shape, weight.gated, bias, residual, gate, outputs)
        return _mixed(rows, weight, bias, residual, gate)
    return _dense(rows, weight, bias, residual, gate)


def _dense(
    rows: Quantized, weight: PackedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
) -> torch.Tensor:
    """Serve a call with a dense weight whose layout fits."""
    of, (oc, ic) = prepared.type_of(weight), weight.shape
    outputs = gated_channels(oc) if gate else oc
    serve.check(rows, rows.shape, weight.data, bias, of, residual, outputs)
    codes, scales, dtype, n = rows.codes, rows.scales, rows.dtype, len(rows.codes)
    if n == 0 or oc == 0:
        return tensors.empty_result(scales.new_empty(n, ic, dtype=dtype), bias, residual, gate, oc)
    index = codes.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _dense(rows, weight, bias, residual, gate)
    now = mode.current()
    chosen = of.prepared((n, dtype, index, True, gate, now.key), now)
    if chosen.launch is None:
        scale = scales.reshape(n, -1)
        return reference.of_codes(codes, scale, dtype, weight, bias, residual, gate, now.batch_invariant)
    codes, scales = _for_kernels(codes, scales)
    y = current.empty((n, outputs), (outputs, 1), dtype)
    x = {"x": codes.data_ptr(), "x_stride": codes.stride(0), "x_scale": scales.data_ptr()}
    return serve.launched(chosen, weight, bias, residual, y, **x)


def _mixed(
    rows: Quantized, weight: MixedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
) -> torch.Tensor:
    """Serve a checked call with a mixed weight: in one launch, or a row set at a time."""
    index = rows.codes.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _mixed(rows, weight, bias, residual, gate)
    codes, scales = rows.codes, rows.scales
    if mixed_launch.takes(rows.shape, rows.dtype, rows.device, weight, gate):
        codes, scales = _for_kernels(codes, scales)
        return mixed_launch.multiply_codes(codes, scales, rows.dtype, weight, bias, residual, gate)
    return mixed.of_row_sets(_dense, rows, weight, bias, residual, gate)


def _check(rows: Quantized, layout: str) -> None:
    codes, scales = rows.codes, rows.scales
    activations = activations_of(layout)
    wanted = activations.dtype
    if wanted is None:
        raise ShapeError(f"linear_quantized: the weight lies in {layout}, expected one of {', '.join(_LAYOUTS)}")
    if codes.dim() != 2 or codes.dtype != wanted:
        raise ShapeError(f"linear_quantized: codes are {list(codes.shape)} {codes.dtype}, expected [T, IC] {wanted}")
    sizes = [len(codes)] if activations.group_size is None else [len(codes), activations.scales(codes.shape[1])]
    if list(scales.shape) != sizes or scales.dtype != torch.float32 or scales.device != codes.device:
        raise ShapeError(
            f"linear_quantized: scales are {list(scales.shape)} {scales.dtype} on {scales.device}, expected "
            f"{sizes} torch.float32 on {codes.device}"
        )


def _for_kernels(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [T, IC] and scales as kernels read them: rows start on 16 bytes, a group's scales stand together."""
    if codes.stride(1) != 1 or codes.stride(0) % 16 or codes.data_ptr() % 16:
        codes = _aligned(codes)
    return codes, scales.contiguous() if scales.dim() == 1 else _by_groups(scales)


def _by_groups(scales: torch.Tensor) -> torch.Tensor:
    """Return scales [T, groups] as kernels read them: those of a group behind each other, `scales_stride` a group."""
    rows, groups = scales.shape
    strides = (1, scales_stride(rows))
    if scales.stride() == strides and scales.data_ptr() % 16 == 0:
        return scales
    memory = scales.new_empty(groups * strides[1])
    return memory.as_strided((rows, groups), strides).copy_(scales)


def _aligned(codes: torch.Tensor) -> torch.Tensor:
    """Return a copy of codes [T, IC] whose rows start on 16 bytes."""
    rows, channels = codes.shape
    copy = codes.new_empty(rows, codes_stride(channels))[:, :channels]
    return copy.copy_(codes)
