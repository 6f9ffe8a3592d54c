"""The experts of a mixture-of-experts layer, with a tensor of each in the checkpoint: linear layers that may be packed.

transformers merges the per-expert tensors of a checkpoint into two; packed ones stay apart by name, as every expert may
have a scheme of its own. Where all of a layer have one scheme, or one mix, their codes lie in stacks and run as one
operator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tersor import ops
from tersor.errors import UnsupportedError
from tersor.formats import Activations, Assignment, Scheme
from tersor.integrations.transformers.expert_parts import kind_of, part_of, rows_of
from tersor.integrations.transformers.experts_form import ExpertsForm, apply_gate, experts_form
from tersor.layouts import STREAM, MixedWeight, PackedWeight, StackedMixedWeight, StackedWeight
from tersor.nn.experts import PackedStack, Rows, multiply_routed, multiply_stacks, one_by_one, waits
from tersor.nn.mixed_stack import MixedStack

_guard = threading.RLock()


class PackedExperts(nn.Module):
    """Experts 0 .. E-1 as submodules `"0"`, `"1"`, ...; each holds its linear layers under the checkpoint's names.

    After `join` the codes of all experts lie in `gate_up` and `down`, and a state dict shows each expert's as it is
    stored. Whatever touches their tensors (a move, a cast, a load) first takes them apart; the next forward joins them.

    Attributes:
        num_experts: E.
        input_names: the layers that read the hidden state: gate and up, or up alone.
        output_name: the layer that writes it back.
        template: the module this one replaced, without its weights; its activation and gate are used.
        gate_up, down: the weights of all experts while they are joined, else `None`.
        chooser: chooses experts by a router's logits (`routers.Chooser`), where they come from it.
    """

    template: Any
    gate_up: PackedStack | MixedStack | None
    down: PackedStack | MixedStack | None

    def __init__(self, experts: Any, input_names: Sequence[str], output_name: str) -> None:
        """Split a module of fused experts into plain linear layers of the same shapes, on the meta device.

        Args:
            experts: as transformers writes them (`experts_form`), without biases; its weights are taken out.
            input_names: names for gate and up (or up alone) in the checkpoint, such as `("w1", "w3")`.
            output_name: name for down in the checkpoint.

        Raises:
            UnsupportedError: the module computes something else than gate, up and down.
        """
        super().__init__()
        self.form = check_experts(experts)
        fused: torch.Tensor = getattr(experts, self.form.fused)
        down: torch.Tensor = experts.down_proj
        self.num_experts, hidden, inner = self.form.count, self.form.hidden, self.form.inner
        self.input_names = tuple(input_names)
        self.output_name = output_name
        for index in range(self.num_experts):
            layers = {name: _linear(hidden, inner, fused.dtype) for name in self.input_names}
            layers[output_name] = _linear(inner, hidden, down.dtype)
            self.add_module(str(index), nn.ModuleDict(layers))
        setattr(experts, self.form.fused, None)
        experts.down_proj = None
        self.template = experts
        self.register_module("gate_up", None)
        self.register_module("down", None)
        self.chooser: Any = None
        self._joins, self._moving = False, False

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run every token through its experts and add their outputs up in float32.

        Args:
            hidden_states: [T, H].
            top_k_index: int64 [T, K], the experts of each token, or a router's logits [T, E] (`chooser`).
            top_k_weights: [T, K], what their outputs are multiplied by, or the same logits.

        Returns:
            [T, H] in the dtype of `hidden_states`.
        """
        x = hidden_states.to(ops.activation_dtype(hidden_states))
        by_logits = self.chooser is not None and top_k_index.is_floating_point()
        if self.ready(x.dtype):
            assert self.gate_up is not None and self.down is not None and self.form.gate is not None
            stacks, gate = (self.gate_up, self.down), self.form.gate
            if by_logits:
                y = multiply_routed(x, *stacks, top_k_index, self.chooser.options, gate)
            else:
                y = multiply_stacks(x, *stacks, top_k_index, top_k_weights, gate)
        else:
            if by_logits:
                top_k_index, top_k_weights = self.chooser.route(top_k_index)
            y = one_by_one(x, top_k_index, top_k_weights, self.num_experts, self._run)
        return y.to(hidden_states.dtype)

    def waits(self, dtype: torch.dtype) -> str:
        """Return why the host waits for the router's choice in a forward with activations of `dtype`, or nothing."""
        if not self.ready(dtype):
            return "its experts are not packed in one scheme or mix, or kernels do not know their gate"
        assert self.gate_up is not None and self.down is not None
        return waits(self.gate_up, self.down, dtype)

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        layers = self._layers(expert)
        inputs = [layers[name](x) for name in self.input_names]
        if len(inputs) == 1:
            return layers[self.output_name](self.template.act_fn(inputs[0]))
        return layers[self.output_name](apply_gate(self.template)(torch.cat(inputs, dim=-1)))

    def _layers(self, expert: int) -> Any:
        return self._modules[str(expert)]

    def _named_layers(self) -> Iterator[tuple[int, str, Any]]:
        for expert in range(self.num_experts):
            for name, layer in self._layers(expert).items():
                yield expert, name, layer

    def join(self) -> None:
        """Let all experts be multiplied by one operator, where their forms agree and the gate is known."""
        layers = list(self._named_layers())
        kinds = {(name == self.output_name, kind_of(layer)) for _, name, layer in layers}
        if self.form.gate is None or len(kinds) > 2 or any(kind is None for _, kind in kinds):
            return
        for expert, name, layer in layers:
            self._layers(expert)[name] = part_of(layer, self, expert, name)
        self._joins = True
        self.ready(layers[0][2].dtype)

    def keep_apart(self) -> None:
        """Give every layer its own tensors back, and never join them again."""
        self.dissolve()
        self._joins = False

    @property
    def joins(self) -> bool:
        """Whether the weights are joined when they are needed next."""
        return self._joins

    def ready(self, dtype: torch.dtype) -> bool:
        """Join the weights if they are apart; tell whether they are joined.

        They stay apart on the meta device, where they lie on several devices or are multiplied in several ways, after
        `keep_apart`, and where they are apart while a CUDA graph is captured.
        """
        if self.gate_up is not None or not self._joins or self._moving:
            return self.gate_up is not None
        with _guard:
            return self.gate_up is not None or self._join(dtype)

    def _join(self, dtype: torch.dtype) -> bool:
        parts = [part for *_, layer in self._named_layers() for part in rows_of(layer)]
        settings = {(part.weight_packed.device, part.dtype, part.activations) for part in parts}
        device, own, activations = next(iter(settings))
        if len(settings) > 1 or device.type == "meta":
            return False
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        down, gate_up = (self._stack(name, dtype, own, activations) for name in (self.output_name, ""))
        for part in parts:
            part.give(device)
        self.down, self.gate_up = down, gate_up
        return True

    def _stack(
        self, name: str, dtype: torch.dtype, own: torch.dtype, activations: Activations
    ) -> PackedStack | MixedStack:
        """Return the weights of one layer of all experts, of gate and up where it has no name, in one module."""
        names, rows = ((name,), Rows.PLAIN) if name else (self.input_names, Rows.HALVES)
        shape = self.form.shape("down_proj" if name else self.form.fused)
        device = rows_of(self._layers(0)[names[0]])[0].weight_packed.device

        def layout(scheme: Scheme) -> str:
            return ops.preferred_layout(scheme, dtype, device, activations)

        packed, mixed = [], []
        for expert in range(self.num_experts):
            both = [self._layers(expert)[each].packed_weight() for each in names]
            if isinstance(both[0], MixedWeight):
                mixed.append((both[0] if name else MixedWeight.gate_up(*both)).to_layout(layout))
            else:
                weight = both[0] if name else PackedWeight.gate_up(*both)
                packed.append(weight.to_layout(layout(weight.scheme)))
        stack: PackedStack | MixedStack
        if mixed:
            level = mixed[0].assignment
            form = level if name else Assignment(level.mix, level.level * len(names))
            stack = MixedStack.of(StackedMixedWeight.stack(mixed), form, shape, rows, own)
        else:
            stack = PackedStack.of(StackedWeight.stack(packed), shape, rows, own)
        stack.activations = activations
        return stack.train(self.training)

    def part(self, expert: int, name: str, number: int = 0) -> PackedWeight:
        """Return the weight of an expert's layer in the stored stream, a copy; the weights must be joined.

        Args:
            expert: its number.
            name: of the layer.
            number: of a mixed layer, which of its row sets.
        """
        stack = self.down if name == self.output_name else self.gate_up
        assert stack is not None
        whole = stack.row_sets[number] if isinstance(stack, MixedStack) else stack
        if name != self.output_name:
            return whole.packed_weight().expert(expert).split_gate_up()[self.input_names.index(name)]
        weight = whole.packed_weight().expert(expert).to_layout(STREAM)
        zero_point = None if weight.zero_point is None else weight.zero_point.clone()
        return PackedWeight(weight.scheme, weight.shape, weight.data.clone(), weight.scale.clone(), zero_point)

    def dissolve(self) -> None:
        """Give every layer its own tensors back, in the stored stream."""
        with _guard:
            if self.gate_up is None:
                return
            for expert, name, layer in self._named_layers():
                for number, part in enumerate(rows_of(layer)):
                    part._set_weight(self.part(expert, name, number))
            self.gate_up = self.down = None

    def fused_weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the decoded weights as transformers fuses them: `gate_up_proj` (or `up_proj`) and `down_proj`."""
        experts = [self._layers(index) for index in range(self.num_experts)]
        inputs = [torch.cat([expert[name].weight.to(dtype) for name in self.input_names]) for expert in experts]
        outputs = [expert[self.output_name].weight.to(dtype) for expert in experts]
        return {self.form.fused: torch.stack(inputs), "down_proj": torch.stack(outputs)}

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """Return the module this one stands for, with its weights decoded to `dtype`."""
        if self.chooser is not None:
            self.chooser.release()
        experts: nn.Module = self.template
        for name, weight in self.fused_weights(dtype).items():
            setattr(experts, name, nn.Parameter(weight, requires_grad=False))
        return experts

    def extra_repr(self) -> str:
        """Say how many experts there are."""
        return f"num_experts={self.num_experts}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedExperts:
        self.dissolve()
        self._moving = True
        try:
            super()._apply(fn, recurse)
        finally:
            self._moving = False
        if self._joins:
            self.ready(self._layers(0)[self.output_name].dtype)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.dissolve()
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_experts(experts: Any) -> ExpertsForm:
    """Return the form of a module of experts that can be split into linear layers.

    Raises:
        UnsupportedError: the module is not one, or does more than gate, up and down.
    """
    form = experts_form(experts)
    odd = [key for key in ("biased", "transposed", "every_token") if getattr(form, key)]
    if odd or not getattr(experts, "is_concatenated", True):
        what = ", ".join([*odd, *([] if getattr(experts, "is_concatenated", True) else ["is_concatenated=False"])])
        raise UnsupportedError(f"experts of {type(experts).__name__} cannot run packed ({what}): ignore them")
    return form


def _linear(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device="meta", dtype=dtype)
