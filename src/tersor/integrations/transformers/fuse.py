"""Which layers of a model can be joined, and joining them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tersor.checkpoint.names import MERGED
from tersor.integrations.transformers.joined import GatedMLP, Join, PackedPart
from tersor.nn.linear import PackedLinear

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
ATTENTIONS = frozenset(f"{family}Attention" for family in _FAMILIES)
"""Classes of transformers whose forward gives one tensor to q_proj, k_proj and v_proj, one after the other."""
MLPS = frozenset(f"{family}MLP" for family in _FAMILIES)
"""Classes of transformers that compute down_proj(act_fn(gate_proj(x)) * up_proj(x)) and nothing else."""
_QKV, _GATE_UP = MERGED["qkv_proj"], MERGED["gate_up_proj"]
_SILU = ("SiLU", "SiLUActivation")


def fuse(model: nn.Module) -> list[str]:
    """Join packed layers that read the same activations: queries, keys and values, and gate and up of silu MLPs.

    Layers are joined in the modules of `ATTENTIONS` and `MLPS`, where they have equal schemes, biases all or none, and
    no hooks. Results differ in rounding only; the state dict stays what it was. `unfuse` undoes it.

    Args:
        model: holds `PackedLinear` layers; changed in place.

    Returns:
        Names of the modules whose layers were joined.
    """
    fused = []
    for name, module in list(model.named_modules()):
        class_name = type(module).__name__
        if class_name in ATTENTIONS and _fits(layers := _children(module, *_QKV)):
            _join(module, _QKV, layers, gated=False)
            fused.append(name)
        elif class_name in MLPS and _is_plain_silu(module) and _fits(layers := _children(module, *_GATE_UP)):
            if layers[0].bias is not None or layers[0].out_features != layers[1].out_features:
                continue
            _join(module, _GATE_UP, layers, gated=True)
            model.set_submodule(name, GatedMLP(module))
            fused.append(name)
    return fused


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: every layer has its own weight again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GatedMLP):
            model.set_submodule(name, module.plain())
    parts = {name: module for name, module in model.named_modules() if isinstance(module, PackedPart)}
    for part in parts.values():
        part.join.dissolve()
    for name, part in parts.items():
        layer = part.plain()
        model.set_submodule(name, layer)
        layer.prepare(layer.dtype)


def _children(module: nn.Module, *names: str) -> list[Any]:
    return [getattr(module, name, None) for name in names]


def _fits(layers: Sequence[Any]) -> bool:
    """Tell whether layers can be joined; subclasses of `PackedLinear` have a meaning of their own."""
    if any(type(layer) is not PackedLinear or _hooked(layer) for layer in layers):
        return False
    shared = {
        (layer.scheme, layer.in_features, layer.dtype, layer.weight_packed.device, layer.bias is None)
        for layer in layers
    }
    return len(shared) == 1


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def _is_plain_silu(module: nn.Module) -> bool:
    return type(getattr(module, "act_fn", None)).__name__ in _SILU and not _hooked(module)


def _join(module: nn.Module, names: Sequence[str], layers: Sequence[PackedLinear], gated: bool) -> None:
    parts = [PackedPart.of(layer) for layer in layers]
    join = Join(parts, gated)
    for index, (name, part) in enumerate(zip(names, parts, strict=True)):
        part.place(join, index)
        setattr(module, name, part)
    join.ready(parts[0].dtype)
