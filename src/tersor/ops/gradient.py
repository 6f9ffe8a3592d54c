"""Gradients through packed linears: of activations, bias and residual. Codes and scales have none.

A gradient goes back through the decoded weight, `tersor::linear_input_grad`, which holds a slice of it at a time.
8-bit activations count as if they had not been quantised (straight-through). Derivatives of any order, forwards and
backwards, follow from two rules: the operator's derivative is `linear_input_grad`, whose own is the operator again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from tersor.errors import ShapeError, UnsupportedError
from tersor.formats import Activations
from tersor.layouts import PackedWeight
from tersor.layouts.gated import interleave, separate
from tersor.layouts.packing import LAYOUTS, target_of
from tersor.ops import autocast, current, dispatch, prepared, reference, tensors
from tersor.ops.gates import Gate

_library = torch.library.Library("tersor", "FRAGMENT")
_library.define(
    "linear_input_grad(Tensor grad, Tensor data, Tensor scale, Tensor? zero_point, str scheme, int oc, int ic, "
    "str layout) -> Tensor"
)


def _serve(
    grad: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: str,
    oc: int,
    ic: int,
    layout: str,
) -> torch.Tensor:
    """Return grad [..., OC] @ W [OC, IC], summed in float32 and rounded once to grad's dtype."""
    of = _checked(grad, data, scheme, oc, ic, layout)
    rows = tensors.rows_of(grad, oc) if oc else grad.reshape(-1, 0)
    if grad.numel() == 0 or ic == 0:
        return grad.new_zeros(*grad.shape[:-1], ic)
    index = grad.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return _serve(grad, data, scale, zero_point, scheme, oc, ic, layout)
    if layout in LAYOUTS and LAYOUTS[layout] == _native_target(of, grad):
        from tersor.ops import dequantized

        result = dequantized.input_grad(rows, data, scale, of)
    else:
        result = reference.input_grad(rows, PackedWeight(of.scheme, (oc, ic), data, scale, zero_point, layout))
    return result.view(*grad.shape[:-1], ic)


def _native_target(of: prepared.WeightType, grad: torch.Tensor) -> str | None:
    """Return the decode target of kernels for a gradient, or `None` where no kernel decodes."""
    if dispatch.unsupported_reason(of.scheme, grad.dtype, grad.device):
        return None
    return target_of(Activations.NATIVE, grad.dtype)


def _shape_only(
    grad: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    scheme: str,
    oc: int,
    ic: int,
    layout: str,
) -> torch.Tensor:
    _checked(grad, data, scheme, oc, ic, layout)
    return grad.new_empty(*grad.shape[:-1], ic)


def _checked(grad: torch.Tensor, data: torch.Tensor, scheme: str, oc: int, ic: int, layout: str) -> prepared.WeightType:
    of = prepared.weight_type(scheme, oc, ic, layout)
    of.check(data)
    if grad.dim() == 0 or grad.shape[-1] != oc:
        raise ShapeError(f"linear: the gradient has shape {list(grad.shape)}, expected [..., {oc}]")
    return of


class _Linear(_SingleLevelFunction):
    """`tersor::linear`, as autograd sees it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        data: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        bias: torch.Tensor | None,
        scheme: str,
        oc: int,
        ic: int,
        layout: str,
        residual: torch.Tensor | None,
        gate: int,
    ) -> torch.Tensor:
        _refuse_scale(scale)
        if gate not in (0, Gate.SILU):  # `ops.gated_linear` makes these of a linear where someone differentiates
            raise UnsupportedError(f"tersor::linear has no derivative with the gate {gate}: call ops.gated_linear")
        # Only silu's derivative depends on what came in: a plain linear keeps no activations.
        save(ctx, data, scale, zero_point, *((x, bias) if gate else ()))
        ctx.of, ctx.gated = (scheme, oc, ic, layout), bool(gate)
        with below():
            return owned(_linear()(x, data, scale, zero_point, bias, scheme, oc, ic, layout, residual, gate))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        data, scale, zero_point, *inputs = ctx.saved_tensors
        for_x, _, _, _, for_bias, *_, for_residual, _ = ctx.needs_input_grad
        inner = _through_gate(grad, _sums(ctx, *inputs)) if ctx.gated else grad
        grad_x = _input_grad()(inner, data, scale, zero_point, *ctx.of) if for_x else None
        grad_bias = inner.reshape(-1, inner.shape[-1]).sum(0) if for_bias else None
        return grad_x, None, None, None, grad_bias, None, None, None, None, grad if for_residual else None, None

    @staticmethod
    def jvp(ctx: Any, x: Any, data: Any, scale: Any, zero_point: Any, bias: Any, *rest: Any) -> torch.Tensor:
        codes, scales, zeros, *inputs = ctx.saved_tensors
        tangent = _linear()(x, codes, scales, zeros, None, *ctx.of)  # what has no tangent comes as zeros
        if bias is not None:
            tangent = tangent + bias
        if ctx.gated:
            tangent = _along_gate(tangent, _sums(ctx, *inputs))
        residual = rest[4]
        return tangent if residual is None else tangent + residual


class _InputGrad(_SingleLevelFunction):
    """`tersor::linear_input_grad`, as autograd sees it: linear in its first argument."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, *of: Any
    ) -> torch.Tensor:
        save(ctx, data, scale, zero_point)
        ctx.of = of
        with below():
            return _input_grad()(grad, data, scale, zero_point, *of)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return _linear()(grad, *ctx.saved_tensors, None, *ctx.of), *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, grad: torch.Tensor, *rest: Any) -> torch.Tensor:
        return _input_grad()(grad, *ctx.saved_tensors, *ctx.of)


@contextmanager
def below() -> Iterator[None]:
    """Call an operator below this level of autograd; further levels of torch.func must find gradients switched on."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        yield


def owned(y: torch.Tensor) -> torch.Tensor:
    """Return a result as one that may be changed in place: rows that were computed in another shape are a view."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def save(ctx: Any, *tensors_: torch.Tensor | None) -> None:
    """Keep tensors of a call for its derivatives, backwards and forwards."""
    ctx.save_for_backward(*tensors_)
    ctx.save_for_forward(*tensors_)


def _refuse_scale(scale: torch.Tensor) -> None:
    if scale.requires_grad:
        raise UnsupportedError(
            "the scales of a packed weight have no gradient: take requires_grad from weight_scale, or train an adapter"
        )


def _sums(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return gate and up of a gated linear before their product, [..., OC] in x's dtype."""
    data, scale, zero_point, *_ = ctx.saved_tensors
    return _linear()(x, data, scale, zero_point, bias, *ctx.of)


def _halves(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = sums.to(torch.promote_types(sums.dtype, torch.float32))
    gate, up = separate(wide.movedim(-1, 0))
    return gate.movedim(0, -1), up.movedim(0, -1)


def _silu_slope(gate: torch.Tensor) -> torch.Tensor:
    sigmoid = torch.sigmoid(gate)
    return sigmoid * (1 + gate * (1 - sigmoid))


def _through_gate(grad: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the sums, [..., OC], of the gradient of silu(gate) * up, [..., F]."""
    gate, up = _halves(sums)
    of_gate, of_up = grad * up * _silu_slope(gate), grad * torch.nn.functional.silu(gate)
    return interleave(of_gate.movedim(-1, 0), of_up.movedim(-1, 0)).movedim(0, -1).to(grad.dtype)


def _along_gate(tangent: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Return the tangent of silu(gate) * up, [..., F], of the tangent of the sums, [..., OC]."""
    (gate, up), (to_gate, to_up) = _halves(sums), _halves(tangent)
    return (_silu_slope(gate) * to_gate * up + torch.nn.functional.silu(gate) * to_up).to(tangent.dtype).contiguous()


def wanted(*inputs: torch.Tensor | None) -> bool:
    """Tell whether someone differentiates by one of these: autograd, forward mode, or a transform of torch.func."""
    transformed = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    if transformed and not torch.compiler.is_compiling():  # a trace sees a transform where there is none
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)


def differentiable(function: Any, operator: Callable[[], Any], defaults: tuple[Any, ...] = ()) -> Callable[..., Any]:
    """Return the autograd kernel of an operator, for who registers it.

    Args:
        function: the operator as autograd sees it.
        operator: returns the operator.
        defaults: values of its last arguments, which torch's dispatcher leaves out where they are given so.
    """
    count = len(operator()._schema.arguments)

    def kernel(*arguments: Any) -> torch.Tensor:
        left_out = count - len(arguments)
        if left_out:
            arguments = (*arguments, *defaults[len(defaults) - left_out :])
        by_autograd = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        if by_autograd or forward_ad._current_level >= 0:
            # The kernel serves one level of torch.func's transforms at a time, like torch's own operators.
            with enable_single_level_autograd_function():
                return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator()(*arguments)

    return kernel


def differentiable_linear() -> Callable[..., Any]:
    """Return the autograd kernel of `tersor::linear`, once that is defined."""
    return differentiable(_Linear, _linear, (None, 0))


def _linear() -> Any:
    return torch.ops.tersor.linear.default


def _input_grad() -> Any:
    return torch.ops.tersor.linear_input_grad.default


for _device in autocast.DEVICES:
    _library.impl("linear_input_grad", _serve, _device)
    _library.impl("linear_input_grad", autocast.ignoring(_input_grad()), f"Autocast{_device}")
_library.impl("linear_input_grad", differentiable(_InputGrad, _input_grad), "Autograd")
torch.library.register_fake("tersor::linear_input_grad", _shape_only, lib=_library)
