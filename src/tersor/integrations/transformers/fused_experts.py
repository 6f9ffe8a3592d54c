"""The experts of a mixture-of-experts layer where a checkpoint stores one tensor for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tersor import ops
from tersor.checkpoint.names import Form
from tersor.errors import UnsupportedError
from tersor.formats import Assignment, Pruned
from tersor.integrations.transformers.experts_form import apply_gate, experts_form
from tersor.nn.experts import PackedStack, Rows, multiply_routed, multiply_stacks, one_by_one, waits
from tersor.nn.linear import cast_bias
from tersor.nn.mixed_stack import MixedStack

STACKS = PackedStack | MixedStack
"""What holds packed weights of all experts."""
_UNKNOWN_GATE = "kernels do not know how it makes gate and up one"


class FusedExperts(nn.Module):
    """Stands for a module of experts of transformers, with the same names; each of its two weights may be packed.

    Attributes:
        num_experts: E.
        template: the module this one replaced, without its weights; its activation and gate are used.
        gate_up_proj, up_proj, down_proj: a `PackedStack` or a `MixedStack`, or the parameter that the replaced module
            had.
        gate_up_proj_bias, up_proj_bias, down_proj_bias: [E, OC], where it had them.
        chooser: chooses experts by a router's logits (`routers.Chooser`), where they come from it.
    """

    template: Any

    def __init__(self, experts: Any) -> None:
        """Take the parameters out of a module of experts.

        Raises:
            UnsupportedError: the module is not one that is known (`experts_form`).
        """
        super().__init__()
        self.form = experts_form(experts)
        self.num_experts = self.form.count
        for name in self.form.names:
            for own in (name, f"{name}_bias"):
                if own in experts._parameters:
                    self.register_parameter(own, experts._parameters.pop(own))
        self.template = experts
        self.chooser: Any = None
        self._arranged: tuple[torch.Tensor, int, torch.Tensor] | None = None
        self.train(experts.training)

    def pack(self, name: str, form: Form, dtype: torch.dtype | None = None) -> PackedStack | MixedStack:
        """Put packed weights, uninitialised, in the place of a parameter.

        Args:
            name: of the parameter, one of `form.names`.
            form: scheme of the packed weights, or the levels of their output features.
            dtype: of activations; that of the parameter when `None`.

        Raises:
            FormatError: the group size does not divide IC.
            ShapeError: another number of output features has levels.
            UnsupportedError: what is left of pruned weights.
        """
        if isinstance(form, Pruned):
            raise UnsupportedError(f"{name} holds a layer's experts, which are not stored sparse")
        old = self._parameters[name]
        assert old is not None
        rows = self.form.rows if name == self.form.fused else Rows.PLAIN
        shape, own = self.form.shape(name), dtype or old.dtype
        stack: PackedStack | MixedStack
        if isinstance(form, Assignment):
            stack = MixedStack(shape, form, rows, device=old.device, dtype=own)
        else:
            stack = PackedStack(shape, form, rows, device=old.device, dtype=own)
        stack.transposed = self.form.transposed
        del self._parameters[name]
        self.add_module(name, stack.train(self.training))
        return stack

    def join(self) -> None:
        """Decide how the weights lie: where only one of the two is packed, its rows stay in the model's order."""
        if not self.joins:
            for stack in self.children():
                if isinstance(stack, STACKS):
                    stack.rows = Rows.PLAIN

    @property
    def joins(self) -> bool:
        """Whether all experts run as one operator: both weights are packed, and the gate is known."""
        return self.form.gate is not None and all(name in self._modules for name in self.form.names)

    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        """Run every token through its experts and add their outputs up in float32.

        Args:
            hidden_states: [T, H]; [E * T, H] where every expert takes every token, those of one after the other.
            routing: the experts of each token, integers [T, K], and what their outputs are multiplied by, [T, K], or
                the router's logits twice (`chooser`); nothing where every expert takes every token.
            named: the same by the names of the replaced module.

        Returns:
            As `hidden_states`.
        """
        x = hidden_states.to(ops.activation_dtype(hidden_states))
        if self.form.every_token:
            index, factors = self._own_tokens(x)
        else:
            index, factors = (*routing, *named.values())
        gate, (first, second) = self.form.gate, (self._modules.get(name) for name in self.form.names)
        by_logits = self.chooser is not None and index.is_floating_point()
        if gate is not None and isinstance(first, STACKS) and isinstance(second, STACKS):
            biases = self._gate_up_bias(first.rows), self._bias("down_proj")
            if by_logits:
                y = multiply_routed(x, first, second, index, self.chooser.options, gate, *biases)
            else:
                y = multiply_stacks(x, first, second, index, factors, gate, *biases)
        else:
            if by_logits:
                index, factors = self.chooser.route(index)
            y = one_by_one(x, index, factors, self.num_experts, self._run)
        return y.to(hidden_states.dtype)

    def waits(self, dtype: torch.dtype) -> str:
        """Return why the host waits for the router's choice in a forward with activations of `dtype`, or nothing."""
        first, second = (self._modules.get(name) for name in self.form.names)
        if not isinstance(first, STACKS) or not isinstance(second, STACKS):
            return "only one of its two weights is packed"
        return waits(first, second, dtype) if self.form.gate is not None else _UNKNOWN_GATE

    def _own_tokens(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which expert each row belongs to: none where it is zero, as that of a token without it is."""
        experts = torch.arange(self.num_experts, device=x.device).repeat_interleave(x.shape[0] // self.num_experts)
        index = torch.where((x != 0).any(dim=-1), experts, -1)
        return index[:, None], x.new_ones(len(index), 1)

    def _bias(self, name: str) -> torch.Tensor | None:
        return self._parameters.get(f"{name}_bias")

    def _gate_up_bias(self, rows: Rows) -> torch.Tensor | None:
        """Return the bias of gate and up interleaved as the weights are, made anew where it has changed."""
        bias = self._bias(self.form.fused)
        if bias is None or bias.requires_grad:
            return None if bias is None else rows.arrange_bias(bias)
        version = 0 if bias.is_inference() else bias._version
        held = self._arranged
        if held is None or held[0] is not bias or held[1] != version:
            self._arranged = held = (bias, version, rows.arrange_bias(bias.detach()))
        return held[2]

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        fused, down = self.form.names
        inner = self._product(fused, expert, x)
        act = apply_gate(self.template) if self.form.gated else self.template.act_fn
        return self._product(down, expert, act(inner))

    def _product(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        bias = cast_bias(self._bias(name), x.dtype)
        bias = None if bias is None else bias[expert]
        stack = self._modules.get(name)
        if isinstance(stack, STACKS):
            return ops.linear(x, stack.ready(x.dtype).expert(expert), bias)
        weight: Any = self._parameters[name]
        return nn.functional.linear(x, weight[expert].T if self.form.transposed else weight[expert], bias)

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """Return the module this one stands for, with its weights decoded to `dtype`."""
        if self.chooser is not None:
            self.chooser.release()
        experts: nn.Module = self.template
        for name in self.form.names:
            stack, bias = self._modules.get(name), self._bias(name)
            if isinstance(stack, STACKS):
                weight = stack.decoded(dtype)
                weight = weight.transpose(1, 2).contiguous() if self.form.transposed else weight
                setattr(experts, name, nn.Parameter(weight, requires_grad=False))
            else:
                setattr(experts, name, self._parameters[name])
            if bias is not None:
                setattr(experts, f"{name}_bias", nn.Parameter(bias.detach().to(dtype), requires_grad=False))
        return experts

    def extra_repr(self) -> str:
        """Say how many experts there are."""
        return f"num_experts={self.num_experts}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FusedExperts:
        self._arranged = None  # a parameter that is moved stays the same object
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arranged": None}
