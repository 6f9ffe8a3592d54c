"""The experts of a mixture-of-experts layer, each with linear layers of its own that may be packed.

transformers 5 keeps the experts of a layer as two 3-D tensors, `gate_up_proj` [E, 2*I, H] and `down_proj` [E, H, I]
(`up_proj` [E, I, H] where there is no gate), and merges the per-expert tensors of a checkpoint into them. Packed
weights stay apart: every expert may have a scheme of its own, and names in memory are those on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tersor.errors import UnsupportedError

_PLAIN = {"has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False}


class PackedExperts(nn.Module):
    """Experts 0 .. E-1 as submodules `"0"`, `"1"`, ...; each holds its linear layers under the checkpoint's names.

    Attributes:
        num_experts: E.
        input_names: the layers that read the hidden state: gate and up, or up alone.
        output_name: the layer that writes it back.
        template: the module this one replaced, without its weights; its activation and gate are used.
    """

    template: Any

    def __init__(self, experts: Any, input_names: Sequence[str], output_name: str) -> None:
        """Split a module of fused experts into plain linear layers of the same shapes, uninitialised.

        Args:
            experts: has `down_proj` and `gate_up_proj` or `up_proj`, as described above; its weights are taken out.
            input_names: names for gate and up (or up alone) in the checkpoint, such as `("w1", "w3")`.
            output_name: name for down in the checkpoint.

        Raises:
            UnsupportedError: the module computes something else than gate, up and down.
        """
        super().__init__()
        self.fused_name = check_experts(experts)
        fused: torch.Tensor = getattr(experts, self.fused_name)
        down: torch.Tensor = experts.down_proj
        self.num_experts, width, hidden = fused.shape
        self.input_names = tuple(input_names)
        self.output_name = output_name
        inner = width // len(input_names)
        for index in range(self.num_experts):
            layers = {name: _linear(hidden, inner, fused) for name in self.input_names}
            layers[output_name] = _linear(inner, hidden, down)
            self.add_module(str(index), nn.ModuleDict(layers))
        setattr(experts, self.fused_name, None)
        experts.down_proj = None
        self.template = experts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run every token through its experts and add their outputs up in float32.

        Args:
            hidden_states: [T, H].
            top_k_index: int64 [T, K], the experts of each token.
            top_k_weights: [T, K], what their outputs are multiplied by.

        Returns:
            [T, H] in the dtype of `hidden_states`.
        """
        total = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        tokens = order // top_k_index.shape[1]
        factors = top_k_weights.reshape(-1)[order].to(torch.float32)
        start = 0
        for expert, count in enumerate(torch.bincount(chosen, minlength=self.num_experts).tolist()):
            if count:
                mine = slice(start, start + count)
                result = self._run(expert, hidden_states[tokens[mine]]).to(torch.float32)
                total.index_add_(0, tokens[mine], result * factors[mine, None])
                start += count
        return total.to(hidden_states.dtype)

    def _run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        layers = self._layers(expert)
        inputs = [layers[name](x) for name in self.input_names]
        if len(inputs) == 1:
            return layers[self.output_name](self.template.act_fn(inputs[0]))
        return layers[self.output_name](self.template._apply_gate(torch.cat(inputs, dim=-1)))

    def _layers(self, expert: int) -> Any:
        return self._modules[str(expert)]

    def fused_weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the decoded weights as transformers fuses them: `gate_up_proj` (or `up_proj`) and `down_proj`."""
        experts = [self._layers(index) for index in range(self.num_experts)]
        inputs = [torch.cat([expert[name].weight.to(dtype) for name in self.input_names]) for expert in experts]
        outputs = [expert[self.output_name].weight.to(dtype) for expert in experts]
        return {self.fused_name: torch.stack(inputs), "down_proj": torch.stack(outputs)}

    def extra_repr(self) -> str:
        """Say how many experts there are."""
        return f"num_experts={self.num_experts}"


def check_experts(experts: Any) -> str:
    """Return the name of the fused input weight of a module of experts as transformers writes them.

    Raises:
        UnsupportedError: the module is not one, or does more than gate, up and down.
    """
    name = type(experts).__name__
    odd = [key for key, plain in _PLAIN.items() if getattr(experts, key, plain) != plain]
    if odd or not hasattr(experts, "_apply_gate") or not hasattr(experts, "act_fn"):
        what = ", ".join(f"{key}={getattr(experts, key)}" for key in odd) or "not in transformers' form"
        raise UnsupportedError(f"experts of {name} cannot run packed ({what}): ignore them")
    gated = getattr(experts, "has_gate", True)
    fused = "gate_up_proj" if gated else "up_proj"
    inputs, outputs = getattr(experts, fused, None), experts.down_proj
    shapes = [list(getattr(tensor, "shape", ())) for tensor in (inputs, outputs)]
    count, width, hidden = shapes[0] if len(shapes[0]) == 3 else (0, 1, 0)
    if not count or (gated and width % 2) or shapes[1] != [count, hidden, width // 2 if gated else width]:
        raise UnsupportedError(
            f"{name} with {fused} {shapes[0]} and down_proj {shapes[1]} is not a layer of gated experts: ignore its "
            "experts"
        )
    return fused


def _linear(inputs: int, outputs: int, like: torch.Tensor) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device=like.device, dtype=like.dtype)
