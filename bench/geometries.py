"""Whole models with the sizes of known ones and random weights, made where they run, packed ones without a plain copy.

Layers of one shape hold the same random weights, each a copy of its own in memory: the time of a step depends on which
bytes are read, and not on what they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tersor import ops
from tersor.compress import quantize_rtn
from tersor.formats import Scheme
from tersor.integrations.transformers.fused_experts import FusedExperts
from tersor.integrations.transformers.packing import join_experts
from tersor.layouts import PackedWeight, StackedWeight
from tersor.models import geometries
from tersor.nn import PackedLinear
from tersor.nn.experts import PackedStack

LLAMA, QWEN_MOE = "llama-3-8b", "qwen3-30b-a3b"
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "vocab_size",
)
GEOMETRIES: dict[str, dict[str, Any]] = {
    name: {
        **{key: geometries.GEOMETRIES[name][key] for key in _SIZES if key in geometries.GEOMETRIES[name]},
        "max_position_embeddings": 8192,
    }
    for name in (LLAMA, QWEN_MOE)
}
TINY: dict[str, dict[str, Any]] = {
    LLAMA: {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    },
    QWEN_MOE: {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    },
}
"""The same kinds in a size for any machine."""
_STD = 0.02
_EMBEDDING_STD = 8.0
"""Rows differ in their last tokens alone: with small embeddings what all have read drowns them, and a step of many rows
goes to the experts of one (11 of 128 were hit by 8 rows, and 15 by 32)."""
_DISTINCT = 8
"""Experts of a layer that are made; the others are copies of them."""


def build(name: str, sizes: dict[str, Any], scheme: Scheme | None, device: str, dtype: torch.dtype) -> Any:
    """Make a model with random weights on `device`; with a scheme its experts, and linears but the head, are packed.

    Args:
        name: one of `GEOMETRIES`, which says of what kind it is.
        sizes: of its config.
        scheme: of packed weights, `None` for plain ones.
        device: of everything.
        dtype: of plain weights and activations.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    torch.manual_seed(0)
    config = (Qwen3MoeConfig if name == QWEN_MOE else LlamaConfig)(
        **sizes, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not random
    if scheme is not None:
        _pack(model, scheme, device, dtype)
    for module in model.modules():
        std = _EMBEDDING_STD if isinstance(module, nn.Embedding) else _STD
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = _random(parameter, device, std)
    if scheme is not None:
        join_experts(model)
    return model


def _random(parameter: nn.Parameter, device: str, std: float) -> nn.Parameter:
    made = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    made = made.fill_(1.0) if made.dim() == 1 else made.normal_(std=std)  # vectors are the weights of norms
    return nn.Parameter(made, requires_grad=False)


def _pack(model: Any, scheme: Scheme, device: str, dtype: torch.dtype) -> None:
    """Put packed modules in the place of linears and experts on the meta device."""

    @functools.cache
    def linear(oc: int, ic: int) -> PackedWeight:
        return _made(scheme, oc, ic, device).to_layout(layout)

    @functools.cache
    def experts(count: int, oc: int, ic: int, gated: bool) -> StackedWeight:
        def one() -> PackedWeight:
            halves = [_made(scheme, oc // 2, ic, device) for _ in range(2)] if gated else []
            return PackedWeight.gate_up(*halves) if gated else _made(scheme, oc, ic, device)

        some = [one().to_layout(layout) for _ in range(min(_DISTINCT, count))]
        return StackedWeight.stack([some[index % len(some)] for index in range(count)])

    layout = ops.preferred_layout(scheme, dtype, torch.device(device))
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = _copy(linear(module.out_features, module.in_features))
            model.model.set_submodule(name, PackedLinear.from_packed(weight, dtype=dtype))
        elif hasattr(module, "num_experts") and hasattr(module, "down_proj"):
            fused = FusedExperts(module)
            for own in fused.form.names:
                rows = fused.pack(own, scheme, dtype).rows
                shape = fused.form.shape(own)
                weight = _copy(experts(*shape, own == fused.form.fused))
                fused.set_submodule(own, PackedStack.of(weight, shape, rows, dtype))
            model.model.set_submodule(name, fused)


def _made(scheme: Scheme, oc: int, ic: int, device: str) -> PackedWeight:
    return PackedWeight.from_encoded(quantize_rtn(torch.randn(oc, ic, device=device) * _STD, scheme))


def _copy(weight: Any) -> Any:
    """Return a packed weight whose tensors are copies."""
    copied: Callable[[torch.Tensor | None], Any] = lambda tensor: None if tensor is None else tensor.clone()  # noqa: E731
    tensors = (copied(weight.data), copied(weight.scale), copied(weight.zero_point))
    return type(weight)(weight.scheme, weight.shape, *tensors, weight.layout)


def read_bytes(model: Any, hits: float) -> tuple[int, int]:
    """Return the bytes of a model's weights, and how many of them a step reads.

    Args:
        model: from `build`.
        hits: experts of all layers that a step's tokens go to, together.
    """
    every = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    layers = [module for module in model.modules() if is_layer_of_experts(module)]
    stored = sum(tensor.nbytes for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
    of_one = stored / sum(layer.num_experts for layer in layers) if layers else 0.0
    return every, round(every - model.get_input_embeddings().weight.nbytes - stored + hits * of_one)


def is_layer_of_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer, packed or not."""
    plain = isinstance(getattr(module, "down_proj", None), nn.Parameter) and hasattr(module, "num_experts")
    return isinstance(module, FusedExperts) or plain


@torch.inference_mode()
def experts_hit(model: Any, step: Callable[[], None]) -> int:
    """Return how many experts of all layers the tokens of one step go to, those of each layer counted once."""
    found: list[torch.Tensor] = []

    def look(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        chosen = arguments[1]
        if chosen.is_floating_point():  # the router's logits
            chosen = chosen.topk(model.config.num_experts_per_tok).indices
        found.append(chosen.unique())

    handles = [module.register_forward_pre_hook(look) for module in model.modules() if is_layer_of_experts(module)]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return sum(len(chosen) for chosen in found)
