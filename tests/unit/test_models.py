"""Decoders of every architecture, against the models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints, decoders, packed_models
from transformers import AutoModelForCausalLM

from tersor import models
from tersor.models.weights import Product

LONG = {"max_position_embeddings": 256}
YARN = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0}
YARN |= {"original_max_position_embeddings": 64}
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
    "gemma2": ("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 0.5}),
    "gemma2 without softcaps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3 with a pattern": ("gemma3_text", {"sliding_window": 10, "num_hidden_layers": 7}),
    "opt": ("opt", {}),
    "opt without biases": ("opt", {"enable_bias": False, "tie_word_embeddings": False}),
    "mixtral": ("mixtral", {}),
    "mixtral with a window": ("mixtral", {"sliding_window": 12}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe with dense layers": (
        "qwen3_moe",
        {"norm_topk_prob": False, "mlp_only_layers": [0], "decoder_sparse_step": 2, "num_hidden_layers": 4},
    ),
    "gpt_oss": ("gpt_oss", {"sliding_window": 16}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2 without groups": (
        "deepseek_v2",
        {"topk_method": "greedy", "q_lora_rank": None, "v_head_dim": 24, "num_hidden_layers": 3},
    ),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 with long texts": ("deepseek_v3", {"rope_interleave": False, "rope_parameters": YARN}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_of_mixed_steps_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    path = packed_models.plain(name, tmp_path / "plain", **{**LONG, **changes})
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    decoder = models.load(path, "cpu")
    assert decoder.dtype is torch.float32
    assert decoders.difference(decoder, reference) < 1e-4


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_plain_experts_in_16_bits_are_as_exact_as_their_dtype(name: str, tmp_path: Path) -> None:
    path = packed_models.plain(name, tmp_path / "plain", **LONG)
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    decoder = models.load(path, "cpu", torch.bfloat16)
    prompt = decoders.texts(decoder.config.vocabulary)[2][:20]
    with torch.inference_mode():
        wanted = reference(prompt[None]).logits[0]
    found = decoders.whole(decoder, prompt)
    assert found.dtype is torch.bfloat16
    # A router may choose another expert where two are nearly alike, so most tokens are compared, not all.
    errors = (found.float() - wanted).abs().amax(dim=1) / wanted.abs().max()
    assert float(errors.median()) < 0.03


def test_a_decoder_says_why_the_host_waits_in_a_step(tmp_path: Path) -> None:
    assert models.load(checkpoints.save("llama", tmp_path / "dense"), "cpu").waits == ""
    plain = checkpoints.save("mixtral", tmp_path / "plain")
    assert models.load(plain, "cpu").waits == "torch has no kernel for the experts of such a device and dtype"
    packed = packed_models.compressed(plain, tmp_path / "packed")
    assert "cpu" in models.load(packed, "cpu").waits
    odd = checkpoints.save("gpt_oss", tmp_path / "odd")
    aligned = "rows of the weights of its experts are no multiple of 16 bytes"
    assert models.load(odd, "cpu", torch.bfloat16).waits == aligned
    half = packed_models.compressed(plain, tmp_path / "half", ignore=["w2"])
    assert models.load(half, "cpu").waits == "only one of the two weights of its experts is packed"


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "qwen3_moe", "deepseek_v3"])
def test_behind_its_attention_the_last_layer_has_the_tokens_that_are_wanted_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = models.load(packed_models.plain(name, tmp_path / "plain", **LONG), "cpu")
    text = decoders.texts(decoder.config.vocabulary)[0]
    every = decoders.whole(decoder, text)
    outputs: list[int] = []
    call = Product.__call__

    def recording(self: Product, x: Any, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self is decoder.layers[-1].attention.out:
            outputs.append(len(x))
        return call(self, x, residual)

    monkeypatch.setattr(Product, "__call__", recording)
    for places in ([17, 3], []):
        found = decoders.whole(decoder, text, places)
        assert found.shape == (len(places), every.shape[1])
        torch.testing.assert_close(found, every[places], rtol=1e-4, atol=1e-5)
    assert outputs == [2]
