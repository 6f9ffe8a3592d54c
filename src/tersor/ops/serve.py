"""Serve one call of a dense packed linear; on the way to a fused kernel every line counts in microseconds."""

from __future__ import annotations

from typing import Protocol

import torch

from tersor.errors import ShapeError
from tersor.layouts import PackedWeight
from tersor.layouts.gated import gated_channels
from tersor.ops import current, dispatch, mode, reference, tensors
from tersor.ops.prepared import Prepared, WeightType
from tersor.ops.settled import settled

_ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Described(Protocol):
    """Activations, of which a call's check asks no more than this."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations as they come, and of the result."""
        ...

    @property
    def device(self) -> torch.device:
        """Where they are."""
        ...


def check(
    x: Described,
    shape: torch.Size,
    data: torch.Tensor,
    bias: torch.Tensor | None,
    of: WeightType,
    residual: torch.Tensor | None,
    outputs: int,
) -> None:
    """Raise ShapeError where the tensors of a call do not fit each other; the message names both sides."""
    dtype = x.dtype
    if not shape or shape[-1] != of.ic:
        raise ShapeError(f"linear: x has shape {list(shape)}, expected [..., {of.ic}] for a weight [{of.oc}, {of.ic}]")
    if dtype not in _ACTIVATION_DTYPES:
        raise ShapeError(f"linear: x is {dtype}, expected float16, bfloat16, float32 or float64")
    if data.device != x.device:
        raise ShapeError(f"linear: x is on {x.device}, the weight on {data.device}")
    if bias is not None and (bias.shape != (of.oc,) or bias.dtype != dtype or bias.device != x.device):
        raise ShapeError(
            f"linear: bias is {list(bias.shape)} {bias.dtype} on {bias.device}, expected [{of.oc}] {dtype} on "
            f"{x.device}"
        )
    if residual is not None:
        expected = (*shape[:-1], outputs)
        if residual.shape != expected or residual.dtype != dtype or residual.device != x.device:
            raise ShapeError(
                f"linear: residual is {list(residual.shape)} {residual.dtype} on {residual.device}, expected "
                f"{list(expected)} {dtype} on {x.device}"
            )


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    of: WeightType,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    """Check a call and serve it.

    Args:
        x: [..., IC], any strides.
        data, scale, zero_point: those of a `PackedWeight`.
        bias: [OC] or `None`.
        of: the type of the weight.
        residual: [..., outputs] or `None`.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one, or 0.

    Returns:
        [..., outputs] in x's dtype, contiguous; outputs are OC, or half as many channels with a gate.
    """
    shape, oc, ic = x.shape, of.oc, of.ic
    outputs = gated_channels(oc) if gate else oc
    check(x, shape, data, bias, of, residual, outputs)
    size = x.numel()
    if size == 0 or oc == 0:
        return tensors.empty_result(x, bias, residual, gate, oc)
    index = x.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return linear(x, data, scale, zero_point, bias, of, residual, gate)
    now = mode.current()
    n, stride = size // ic, ic
    if not x.is_contiguous():
        x = tensors.rows_of(x, ic)
        stride = x.stride(0)
    address = x.data_ptr()
    aligned = not (address % 16 or stride % 8)
    if now.batch_invariant and not aligned:
        x = tensors.aligned_rows(x, ic)
        stride, address, aligned = x.stride(0), x.data_ptr(), True
    chosen = of.prepared((n, x.dtype, index, aligned, gate, now.key), now)
    launch = chosen.launch
    if residual is not None:
        residual = tensors.contiguous(residual)
    if launch is None:
        x = x.reshape(-1, ic)
        added = None if residual is None else residual.view(-1, outputs)
        if chosen.tokens:
            y = _in_turns(x, data, scale, zero_point, bias, of, added, gate, chosen.tokens)
        elif chosen.decision.kernel == dispatch.DEQUANTIZE:
            from tersor.ops import dequantized

            y = dequantized.linear(x, data, scale, bias, of, added, gate)
        else:
            weight = PackedWeight(of.scheme, (oc, ic), data, scale, zero_point, of.layout)
            y = reference.linear(x, weight, bias, added, gate, now.batch_invariant)
        return y.view(*shape[:-1], outputs)
    y = tensors.output(shape, n, outputs, x.dtype)
    stream = current.stream(index)
    partial = arrived = bias_address = residual_address = x_scale = 0
    if chosen.quantize is not None:
        codes, x_scale = chosen.quantize(stream, address, stride)
        address, stride = codes.data_ptr(), chosen.quantize.stride
    if chosen.floats:
        partial, arrived, _parts = now.workspace.split_sums(index, stream, chosen.floats, chosen.counters)
    if bias is not None:
        bias = bias if bias.is_contiguous() else bias.contiguous()
        bias_address = bias.data_ptr()
    if residual is not None:
        residual_address = residual.data_ptr()
    launch(
        stream=stream,
        weight=data.data_ptr(),
        scale=scale.data_ptr(),
        x=address,
        x_stride=stride,
        x_scale=x_scale,
        bias=bias_address,
        residual=residual_address,
        y=y.data_ptr(),
        partial=partial,
        arrived=arrived,
        early=settled(data, scale) and now.early,
    )
    return y


def launched(
    chosen: Prepared,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    *,
    x: int,
    x_stride: int,
    x_scale: int,
    **norms: float,
) -> torch.Tensor:
    """Launch a fused kernel on the current device, that of y, for rows that are not plain activations; return y.

    Args:
        chosen: what serves the call; it has a launch.
        weight, bias: as for `ops.linear`.
        residual: [N, outputs] or `None`.
        y: [N, outputs], written.
        x, x_stride, x_scale, norms: arguments of the launch (`kernels.dense.prepare_fused`).
    """
    index, now = y.get_device(), mode.current()
    stream, partial, arrived = current.stream(index), 0, 0
    if chosen.floats:
        partial, arrived, _parts = now.workspace.split_sums(index, stream, chosen.floats, chosen.counters)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else tensors.contiguous(residual)
    assert chosen.launch is not None
    chosen.launch(
        stream=stream,
        weight=weight.data.data_ptr(),
        scale=weight.scale.data_ptr(),
        x=x,
        x_stride=x_stride,
        x_scale=x_scale,
        bias=0 if bias is None else bias.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        y=y.data_ptr(),
        partial=partial,
        arrived=arrived,
        early=settled(weight.data, weight.scale) and now.early,
        **norms,
    )
    return y


def shape_only(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    of: WeightType,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    """Check a call and return an uninitialised result, as `linear` would make one: for tensors without memory."""
    outputs = gated_channels(of.oc) if gate else of.oc
    check(x, x.shape, data, bias, of, residual, outputs)
    return x.new_empty(*x.shape[:-1], outputs)


def _in_turns(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    of: WeightType,
    residual: torch.Tensor | None,
    gate: int,
    tokens: int,
) -> torch.Tensor:
    """Return the result [N, outputs] of several calls, each of at most `tokens` tokens."""
    parts = []
    for first in range(0, x.shape[0], tokens):
        added = None if residual is None else residual[first : first + tokens]
        parts.append(linear(x[first : first + tokens], data, scale, zero_point, bias, of, added, gate))
    return torch.cat(parts)
