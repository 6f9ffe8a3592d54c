"""The torch operator `tersor::linear` of dense packed weights, plain or gated, and its meta twin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from tersor.layouts import PackedWeight
from tersor.ops import autocast, gradient, prepared, serve

_PLAIN = (torch.Tensor, torch.nn.Parameter)

_library = torch.library.Library("tersor", "DEF")
_library.define(
    "linear(Tensor x, Tensor data, Tensor scale, Tensor? zero_point, Tensor? bias, str scheme, int oc, int ic, "
    "str layout, Tensor? residual=None, int gate=0) -> Tensor"
)


def multiply(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int
) -> torch.Tensor:
    """Serve a call of `ops.linear` or `ops.gated_linear`, through torch's dispatcher where anyone looks."""
    if weight.outliers is not None:
        from tersor.ops import outliers

        return outliers.multiply(x, weight, bias, residual, gate)
    data, scale, zero_point = weight.data, weight.scale, weight.zero_point
    if looked_at(x, bias, residual):
        oc, ic = weight.shape
        key, layout = weight.scheme.key(), weight.layout
        return _operator(x, data, scale, zero_point, bias, key, oc, ic, layout, residual, gate)
    return serve.linear(x, data, scale, zero_point, bias, prepared.type_of(weight), residual, gate)


def looked_at(*tensors: torch.Tensor | None) -> bool:
    """Tell whether someone has to see an operator of these tensors: a mode, a transform, a trace, autograd, autocast or
    a subclass.

    Where nobody does, the dispatcher would only cost time.
    """
    if (
        torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transform() is not None
        or _trace() is not None
        or _profiled()
        or _autocast()
        or forward_ad._current_level >= 0
    ):
        return True
    graded = _grad_enabled()
    for one in tensors:
        if one is not None and (
            type(one) not in _PLAIN or not (one.is_cuda or one.is_cpu) or one.is_neg() or (graded and one.requires_grad)
        ):
            return True
    return False


_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state
_autocast = autocast.enabled
_profiled = torch.autograd._profiler_enabled
_grad_enabled = torch.is_grad_enabled


def _operator_of(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return an implementation of the operator: `run` gets the weight's type in place of what the schema says of it."""

    def implementation(
        x: torch.Tensor,
        data: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        bias: torch.Tensor | None,
        scheme: str,
        oc: int,
        ic: int,
        layout: str,
        residual: torch.Tensor | None = None,
        gate: int = 0,
    ) -> torch.Tensor:
        of = prepared.weight_type(scheme, oc, ic, layout)
        of.check(data)
        return run(x, data, scale, zero_point, bias, of, residual, gate)

    return implementation


_operator = torch.ops.tersor.linear.default
for _device in autocast.DEVICES:
    _library.impl("linear", _operator_of(serve.linear), _device)
    _library.impl("linear", autocast.casting(_operator), f"Autocast{_device}")
_library.impl("linear", gradient.differentiable_linear(), "Autograd")
torch.library.register_fake("tersor::linear", _operator_of(serve.shape_only), lib=_library)
