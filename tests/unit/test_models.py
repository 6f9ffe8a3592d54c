"""Decoders of every architecture, against the models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoders, packed_models
from transformers import AutoModelForCausalLM

from tersor import models

LONG = {"max_position_embeddings": 256}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases and many heads": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "head_dim": 32},
    ),
    "llama with a tied head": ("llama", {"tie_word_embeddings": True}),
    "llama with other eps": ("llama", {"rms_norm_eps": 0.1}),
    "llama with gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": 20}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 with late windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {"sliding_window": 30, "partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_of_mixed_steps_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    path = packed_models.plain(name, tmp_path / "plain", **{**LONG, **changes})
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    decoder = models.load(path, "cpu")
    assert decoder.dtype is torch.float32
    assert decoders.difference(decoder, reference) < 1e-4
