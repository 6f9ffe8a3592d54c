"""The torch operator `tersor::sparse_linear` of pruned weights as they are stored, its meta twin and its gradient.

A product decodes a block of rows, with zeros for what is pruned, and multiplies. So what is pruned counts as the zero
that it is: a NaN or an infinity among activations makes NaN of it, as in a dense product, whoever serves the call.
`sparse_layout` is where that is decided. One in kernel tiles has an operator of its own, `tiled_sparse`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from tersor.errors import ShapeError
from tersor.formats import Sparse
from tersor.layouts import SparseWeight
from tersor.layouts.gated import gated_channels
from tersor.layouts.sparse import decode
from tersor.ops import autocast, dispatch, gradient, mode, reference, sparse_gradient, tensors
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
    outputs = checked(x, mask, (mask.shape[0], ic), bias, residual, gate)
    if x.numel() == 0 or oc == 0:
        return tensors.empty_result(x, bias, residual, gate, oc)
    rows = tensors.rows_of(x, ic)
    now, represented = mode.current(), _representation(sparse)
    whole = not dispatch.environment_reason(x.dtype, x.device) and not now.batch_invariant
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
    return x.new_empty(*x.shape[:-1], checked(x, mask, (mask.shape[0], ic), bias, residual, gate))


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


def checked(
    x: torch.Tensor,
    held: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: int,
) -> int:
    """Return the outputs of a call; raise ShapeError where its tensors do not fit each other.

    Args:
        x, bias, residual, gate: of the call.
        held: a tensor of the weight.
        shape: (OC, IC) of the weight.
    """
    oc, ic = shape
    if not x.dim() or x.shape[-1] != ic:
        raise ShapeError(f"linear: x has shape {list(x.shape)}, expected [..., {ic}] for a weight [{oc}, {ic}]")
    if x.dtype not in _ACTIVATION_DTYPES:
        raise ShapeError(f"linear: x is {x.dtype}, expected float16, bfloat16, float32 or float64")
    if held.device != x.device:
        raise ShapeError(f"linear: x is on {x.device}, the weight on {held.device}")
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
_FUNCTION, _GRAD_FUNCTION = sparse_gradient.functions(_linear, _input_grad, held=5, described=2)
_library.impl("sparse_linear", gradient.differentiable(_FUNCTION, _linear, (None, 0)), "Autograd")
_library.impl("sparse_input_grad", gradient.differentiable(_GRAD_FUNCTION, _input_grad), "Autograd")
torch.library.register_fake("tersor::sparse_linear", _shape_only, lib=_library)
torch.library.register_fake("tersor::sparse_input_grad", _grad_shape, lib=_library)
