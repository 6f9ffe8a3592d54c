"""The torch operator `tersor::sparse_linear` of pruned weights, plain or gated, its meta twin and its gradient.

A product decodes a block of rows, with zeros for what is pruned, and multiplies. So what is pruned counts as the zero
that it is: a NaN or an infinity among activations makes NaN of it, as in a dense product, whoever serves the call.
`serving` is where that is decided.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd.function import _SingleLevelFunction

from tersor.errors import ShapeError
from tersor.formats import Sparse
from tersor.layouts import SparseWeight
from tersor.layouts.gated import gated_channels
from tersor.layouts.sparse import decode
from tersor.ops import autocast, dispatch, gradient, mode, reference, tensors
from tersor.ops.gates import Gate

_library = torch.library.Library("tersor", "FRAGMENT")
_WEIGHT = "Tensor mask, Tensor values, Tensor? scale, Tensor? zero_point, Tensor starts"
_library.define(
    f"sparse_linear(Tensor x, {_WEIGHT}, Tensor? bias, str sparse, int ic, Tensor? residual=None, int gate=0) -> Tensor"
)
_library.define(f"sparse_input_grad(Tensor grad, {_WEIGHT}, str sparse, int ic) -> Tensor")

_ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def multiply(
    x: torch.Tensor, weight: SparseWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
) -> torch.Tensor:
    """Serve a call of `ops.linear` or `ops.gated_linear`.

    Raises:
        ShapeError: sizes, dtypes or devices that do not fit.
    """
    if gate and gradient.wanted(x, bias, residual):
        y = Gate(gate).of_rows(multiply(x, weight, bias, None, 0))
        return y if residual is None else y + residual
    held = (weight.mask, weight.values, weight.scale, weight.zero_point, weight.starts)
    return _linear()(x, *held, bias, weight.form.key(), weight.shape[1], residual, gate)


def serving(dtype: torch.dtype, device: torch.device) -> dispatch.Reason:
    """Say who multiplies activations of a dtype on a device with a pruned weight, and why."""
    why = dispatch.environment_reason(dtype, device)
    if why:
        return dispatch.Reason(dispatch.REFERENCE, why)
    return dispatch.Reason(dispatch.DECOMPRESS, "pruned weights are decoded a block of rows at a time")


def _serve(
    x: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    starts: torch.Tensor,
    bias: torch.Tensor | None,
    sparse: str,
    ic: int,
    residual: torch.Tensor | None = None,
    gate: int = 0,
) -> torch.Tensor:
    """Return the result, summed in float32 (float64 for such x) and rounded once to x's dtype."""
    oc = mask.shape[0]
    outputs = _checked(x, mask, bias, ic, residual, gate)
    if x.numel() == 0 or oc == 0:
        return tensors.empty_result(x, bias, residual, gate, oc)
    rows = tensors.rows_of(x, ic)
    now, represented = mode.current(), _representation(sparse)
    whole = serving(x.dtype, x.device).kernel == dispatch.DECOMPRESS and not now.batch_invariant
    wide = rows if whole else rows.to(torch.promote_types(x.dtype, torch.float32))

    def product(first: int, last: int) -> torch.Tensor:
        block = decode(represented, ic, mask, values, scale, zero_point, starts, wide.dtype, (first, last))
        if whole:
            part = torch.mm(wide, block.T, out_dtype=torch.float32)
        elif now.batch_invariant:
            part = torch.stack([block @ token.clone() for token in wide])
        else:
            part = wide @ block.T
        return part if bias is None else part.add_(bias[first:last])

    added = None if residual is None else residual.reshape(-1, outputs)
    y = reference.in_blocks(rows, x.dtype, (oc, ic), product, added, gate)
    return y.view(*x.shape[:-1], outputs)


def _shape_only(
    x: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    starts: torch.Tensor,
    bias: torch.Tensor | None,
    sparse: str,
    ic: int,
    residual: torch.Tensor | None = None,
    gate: int = 0,
) -> torch.Tensor:
    """Check a call and return an uninitialised result: for tensors without memory."""
    return x.new_empty(*x.shape[:-1], _checked(x, mask, bias, ic, residual, gate))


def _serve_grad(
    grad: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    starts: torch.Tensor,
    sparse: str,
    ic: int,
) -> torch.Tensor:
    """Return grad [..., OC] @ W [OC, IC], summed in float32 and rounded once to grad's dtype."""
    oc = mask.shape[0]
    if not oc or not grad.numel():
        return grad.new_zeros(*grad.shape[:-1], ic)
    rows = grad.reshape(-1, oc)
    wide = rows.to(torch.promote_types(grad.dtype, torch.float32))
    total, represented = wide.new_zeros(len(rows), ic), _representation(sparse)
    step = max(1, reference.BLOCK_ELEMENTS.get(grad.device.type, 1 << 18) // max(ic, 1))
    for first in range(0, oc, step):
        last = min(first + step, oc)
        block = decode(represented, ic, mask, values, scale, zero_point, starts, wide.dtype, (first, last))
        total.addmm_(wide[:, first:last], block)
    return total.to(grad.dtype).view(*grad.shape[:-1], ic)


def _checked(
    x: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    ic: int,
    residual: torch.Tensor | None,
    gate: int,
) -> int:
    """Return the outputs of a call; raise ShapeError where its tensors do not fit each other."""
    oc = mask.shape[0]
    if not x.dim() or x.shape[-1] != ic:
        raise ShapeError(f"linear: x has shape {list(x.shape)}, expected [..., {ic}] for a weight [{oc}, {ic}]")
    if x.dtype not in _ACTIVATION_DTYPES:
        raise ShapeError(f"linear: x is {x.dtype}, expected float16, bfloat16, float32 or float64")
    if mask.device != x.device:
        raise ShapeError(f"linear: x is on {x.device}, the weight on {mask.device}")
    outputs = gated_channels(oc) if gate else oc
    for name, tensor, expected in (("bias", bias, (oc,)), ("residual", residual, (*x.shape[:-1], outputs))):
        if tensor is not None and (tensor.shape != expected or tensor.dtype != x.dtype or tensor.device != x.device):
            raise ShapeError(
                f"linear: {name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, expected {list(expected)} "
                f"{x.dtype} on {x.device}"
            )
    return outputs


@functools.cache
def _representation(key: str) -> Sparse:
    return Sparse.from_key(key)


class _Linear(_SingleLevelFunction):
    """`tersor::sparse_linear` without a gate, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:  # type: ignore[override]
        *weight, bias, sparse, ic, residual, _ = rest
        gradient.save(ctx, *weight)
        ctx.of = (sparse, ic)
        with gradient.below():
            return _linear()(x, *weight, bias, sparse, ic, residual, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        for_x, *_, for_bias, _, _, for_residual, _ = ctx.needs_input_grad
        grad_x = _input_grad()(grad, *ctx.saved_tensors, *ctx.of) if for_x else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if for_bias else None
        return grad_x, *(None,) * 5, grad_bias, None, None, grad if for_residual else None, None

    @staticmethod
    def jvp(ctx: Any, x: Any, *rest: Any) -> torch.Tensor:
        *_, bias, _, _, residual, _ = rest
        tangent = _linear()(x, *ctx.saved_tensors, None, *ctx.of)  # what has no tangent comes as zeros
        for added in (bias, residual):
            tangent = tangent if added is None else tangent + added
        return tangent


class _InputGrad(_SingleLevelFunction):
    """`tersor::sparse_input_grad`, as autograd sees it: linear in its first argument."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, *rest: Any) -> torch.Tensor:  # type: ignore[override]
        *weight, sparse, ic = rest
        gradient.save(ctx, *weight)
        ctx.of = (sparse, ic)
        with gradient.below():
            return _input_grad()(grad, *rest)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return _linear()(grad, *ctx.saved_tensors, None, *ctx.of), *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, grad: torch.Tensor, *rest: Any) -> torch.Tensor:
        return _input_grad()(grad, *ctx.saved_tensors, *ctx.of)


def _grad_shape(grad: torch.Tensor, *rest: Any) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], rest[-1])


def _linear() -> Any:
    return torch.ops.tersor.sparse_linear.default


def _input_grad() -> Any:
    return torch.ops.tersor.sparse_input_grad.default


for _device in autocast.DEVICES:
    _library.impl("sparse_linear", _serve, _device)
    _library.impl("sparse_linear", autocast.casting(_linear()), f"Autocast{_device}")
    _library.impl("sparse_input_grad", _serve_grad, _device)
    _library.impl("sparse_input_grad", autocast.ignoring(_input_grad()), f"Autocast{_device}")
_library.impl("sparse_linear", gradient.differentiable(_Linear, _linear, (None, 0)), "Autograd")
_library.impl("sparse_input_grad", gradient.differentiable(_InputGrad, _input_grad), "Autograd")
torch.library.register_fake("tersor::sparse_linear", _shape_only, lib=_library)
torch.library.register_fake("tersor::sparse_input_grad", _grad_shape, lib=_library)
