"""Gradients through linears of pruned weights: of activations, bias and residual, of any order, as in `gradient`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import _SingleLevelFunction

from tersor.ops import gradient


def functions(
    linear: Callable[[], Any], input_grad: Callable[[], Any], *, held: int, described: int
) -> tuple[type[_SingleLevelFunction], type[_SingleLevelFunction]]:
    """Return an operator without a gate, and its input gradient, as autograd sees them.

    Args:
        linear: returns the operator (x, held tensors, bias, what describes them, residual, gate) -> y.
        input_grad: returns the operator (grad, held tensors, what describes them) -> gradient of x.
        held: tensors of the weight.
        described: arguments that say what these mean.
    """

    class Linear(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:  # type: ignore[override]
            weight, bias, of, residual = rest[:held], rest[held], rest[held + 1 : -2], rest[-2]
            gradient.save(ctx, *weight)
            ctx.of = of
            with gradient.below():
                return gradient.owned(linear()(x, *weight, bias, *of, residual, 0))

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
            needs = ctx.needs_input_grad
            grad_x = input_grad()(grad, *ctx.saved_tensors, *ctx.of) if needs[0] else None
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needs[1 + held] else None
            return grad_x, *(None,) * held, grad_bias, *(None,) * described, grad if needs[-2] else None, None

        @staticmethod
        def jvp(ctx: Any, x: Any, *rest: Any) -> torch.Tensor:
            tangent = linear()(x, *ctx.saved_tensors, None, *ctx.of)  # what has no tangent comes as zeros
            for added in (rest[held], rest[-2]):
                tangent = tangent if added is None else tangent + added
            return tangent

    class InputGrad(_SingleLevelFunction):  # linear in its first argument
        @staticmethod
        def forward(ctx: Any, grad: torch.Tensor, *rest: Any) -> torch.Tensor:  # type: ignore[override]
            gradient.save(ctx, *rest[:held])
            ctx.of = rest[held:]
            with gradient.below():
                return input_grad()(grad, *rest)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
            return linear()(grad, *ctx.saved_tensors, None, *ctx.of), *(None,) * (held + described)

        @staticmethod
        def jvp(ctx: Any, grad: torch.Tensor, *rest: Any) -> torch.Tensor:
            return input_grad()(grad, *ctx.saved_tensors, *ctx.of)

    return Linear, InputGrad
