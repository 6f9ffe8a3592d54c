"""A part of a decoder whose output is not finite is found by its name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints

from tersor import models
from tersor.models.finite import first_not_finite

TOKENS = [3, 4, 5] * 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("finite")
    return {name: checkpoints.save(name, root / name) for name in ("llama", "mixtral", "gemma2", "deepseek_v3")}


CASES: list[tuple[str, Callable[[Any], torch.Tensor], str]] = [
    ("llama", lambda model: model.embedding.weight, "model.embed_tokens"),
    ("llama", lambda model: model.layers[0].norms[0].weight, "model.layers.0.input_layernorm"),
    (
        "llama",
        lambda model: model.layers[1].attention.qkv.weight,
        "model.layers.1.self_attn.q_proj or k_proj or v_proj",
    ),
    ("llama", lambda model: model.layers[1].attention.out.weight, "model.layers.1.self_attn.o_proj"),
    ("llama", lambda model: model.layers[1].norms[1].weight, "model.layers.1.post_attention_layernorm"),
    ("llama", lambda model: model.layers[0].ffn.up.product.weight, "model.layers.0.mlp.gate_proj or up_proj"),
    ("llama", lambda model: model.layers[0].ffn.down.weight, "model.layers.0.mlp.down_proj"),
    ("llama", lambda model: model.norm.weight, "model.norm"),
    ("llama", lambda model: model.head.weight, "lm_head"),
    ("mixtral", lambda model: model.layers[1].ffn.down, "model.layers.1.block_sparse_moe"),
    ("gemma2", lambda model: model.layers[1].out_norms[1].weight, "model.layers.1.post_feedforward_layernorm"),
    ("deepseek_v3", lambda model: model.layers[1].attention.out.weight, "model.layers.1.self_attn.o_proj"),
]


@pytest.mark.parametrize(("name", "weight", "part"), CASES, ids=[f"{case[0]} {case[2]}" for case in CASES])
def test_the_first_part_that_is_not_finite_is_named(
    name: str, weight: Callable[[Any], torch.Tensor], part: str, folders: dict[str, Path]
) -> None:
    model = models.load(folders[name], "cpu")
    assert first_not_finite(model, TOKENS) == ""
    weight(model).fill_(math.nan)
    assert first_not_finite(model, TOKENS) == f", first in {part}"
