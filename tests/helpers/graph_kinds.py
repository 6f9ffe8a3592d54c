"""Small models of nine kinds, traced once a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from helpers.graph_models import Gpt, Mixture, Unet, WideResNet
from tersor.planner.graph.ir import Graph
from tersor.planner.graph.trace import trace

IDS = (torch.arange(16) % 13).view(2, 8)
SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def _gpt2() -> Example:
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=16, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), (IDS,), {}


def _bert() -> Example:
    return transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=64)), (IDS,), {"attention_mask": IDS > 0}


def _t5() -> Example:
    config = transformers.T5Config(
        num_layers=2, d_model=32, d_ff=64, num_heads=4, d_kv=8, vocab_size=64, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), (), {"input_ids": IDS, "labels": IDS, "use_cache": False}


def _vit() -> Example:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4)
    return transformers.ViTModel(config), (torch.zeros(2, 3, 16, 16),), {}


def _mixtral() -> Example:
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, vocab_size=64, num_local_experts=4, use_cache=False
    )
    return transformers.MixtralForCausalLM(config), (IDS,), {}


MODELS: dict[str, Callable[[], Example]] = {
    "GPT": lambda: (Gpt(64, 32, 4, 2, 8), (IDS, IDS), {}),
    "GPT-2": _gpt2,
    "BERT": _bert,
    "T5": _t5,
    "ViT": _vit,
    "Wide-ResNet": lambda: (WideResNet(), (torch.randn(4, 3, 8, 8),), {}),
    "UNet": lambda: (Unet(), (torch.randn(2, 3, 16, 16),), {}),
    "mixture with capacity": lambda: (Mixture(16, 32, 4, 8), (torch.randn(16, 16),), {}),
    "Mixtral": _mixtral,
}


@functools.cache
def traced(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Graph]:
    """Return a model in evaluation mode, its inputs and its graph."""
    torch.manual_seed(0)
    module, args, kwargs = MODELS[name]()
    return module.eval(), args, kwargs, trace(module, args, kwargs)
