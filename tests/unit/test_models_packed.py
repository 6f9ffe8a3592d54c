"""Decoders with packed weights, against transformers with the decoded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoders, packed_models, tiny_lm
from helpers.fakes import FakeGpu
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tersor import models
from tersor.errors import UnsupportedError
from tersor.layouts import PackedWeight, StackedWeight
from tersor.models import stored_experts
from tersor.models.mixture import Mixture
from tersor.models.weights import Activated, FeedForward, GatedProduct, Product, Products

LONG = {"max_position_embeddings": 256}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"format": "fp6_e3m2"}),
    "llama in groups with zero points": ("llama", {"format": "uint4", "group_size": 32}),
    "queries of another scheme": ("llama", {"format": "fp6_e3m2", "overrides": ["q_proj=int8"]}),
    "up of another scheme": ("llama", {"format": "mxfp4_e2m1", "overrides": [r"layers\.1\.mlp\.up_proj=int5:g32"]}),
    "up left plain": ("qwen2", {"format": "int4", "group_size": 32, "ignore": ["up_proj", "k_proj"]}),
    "phi3": ("phi3", {"format": "uint4", "group_size": 32}),
    "gemma2 with its embedding": ("gemma2", {"format": "fp6_e3m2", "overrides": ["embed_tokens=int8:g64"]}),
    "opt": ("opt", {"format": "fp5_e2m2"}),
    "head and embedding": ("qwen3", {"format": "fp6_e2m3", "overrides": ["lm_head=int8", "embed_tokens=fp8_e4m3"]}),
    "mixtral": ("mixtral", {"format": "fp6_e3m2", "overrides": [r"experts\.\d\.w2=int8"]}),
    "qwen3_moe": ("qwen3_moe", {"format": "int4", "group_size": 32}),
    "deepseek_v2": ("deepseek_v2", {"format": "fp6_e3m2", "overrides": ["kv_a_proj_with_mqa=int8"]}),
    "deepseek_v3": ("deepseek_v3", {"format": "uint4", "group_size": 32}),
    "gpt_oss": ("gpt_oss", {"format": "mxfp4_e2m1"}),
    "gpt_oss with plain down": ("gpt_oss", {"format": "fp6_e3m2", "ignore": ["down_proj"]}),
    "gpt_oss with plain gate and up": ("gpt_oss", {"format": "int4", "ignore": ["gate_up_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_of_packed_weights_are_those_of_the_decoded_ones(case: str, tmp_path: Path) -> None:
    name, options = CASES[case]
    changes = {**LONG, "intermediate_size": 96} if name == "gpt_oss" else LONG
    made = packed_models.case(name, tmp_path, options, **changes)
    path = packed_models.decoded(made.plain, made.packed, tmp_path / "decoded")
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    assert decoders.difference(models.load(made.packed, "cpu"), reference) < 1e-4


def test_patterns_find_the_experts_of_mixtral_by_their_names_in_the_model(tmp_path: Path) -> None:
    options = {"format": "fp6_e3m2", "overrides": [r"layers\.1\.mlp\.experts=int8"]}
    made = packed_models.case("mixtral", tmp_path, options, **LONG)
    decoder = models.load(made.packed, "cpu")
    assert [mixture_of(decoder, index).down.scheme.name for index in range(2)] == ["fp6_e3m2", "int8"]
    reference = AutoModelForCausalLM.from_pretrained(made.packed).eval()
    assert decoders.difference(decoder, reference) < 1e-4


@pytest.mark.parametrize(
    ("case", "activations"),
    [("qwen3_moe", "16bit"), ("qwen3_moe", "int8"), ("mixtral", "16bit"), ("gpt_oss", "16bit")],
)
@pytest.mark.parametrize("together", [1, 3, 100])
def test_experts_that_become_tiles_together_are_those_of_each(
    case: str, activations: str, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = CASES[case]
    changes = {**LONG, "intermediate_size": 96} if name == "gpt_oss" else LONG
    made = packed_models.case(name, tmp_path, options, **changes)
    stream = mixture_of(models.load(made.packed, "cpu", torch.bfloat16), 1)
    fake = FakeGpu("NVIDIA H200")
    fake.install(monkeypatch)
    fake.take_cpu_tensors(monkeypatch)
    _, rows, channels = stream.down.shape
    monkeypatch.setattr(stored_experts, "_TOGETHER", together * rows * channels)
    tiles = mixture_of(models.load(made.packed, "cpu", torch.bfloat16, activations=activations), 1)
    layout = "tiles_int8" if activations == "int8" else "tiles_bfloat16"
    for found, before in ((tiles.gate_up, stream.gate_up), (tiles.down, stream.down)):
        assert isinstance(found, StackedWeight) and isinstance(before, StackedWeight)
        assert (found.layout, before.layout) == (layout, "stream")
        for index in range(before.experts):
            wanted = before.expert(index).to_layout(layout)
            assert torch.equal(found.expert(index).data, wanted.data)
            assert torch.equal(found.expert(index).scale, wanted.scale)


def test_experts_in_several_schemes_are_refused_by_name(tmp_path: Path) -> None:
    options = {"format": "fp6_e3m2", "overrides": [r"layers\.1\.mlp\.experts\.2\.up_proj=int8"]}
    made = packed_models.case("qwen3_moe", tmp_path, options)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1\.mlp\.experts\.0\.gate_proj and other experts"):
        models.load(made.packed, "cpu")


def test_products_that_read_the_same_activations_are_one_where_schemes_agree(tmp_path: Path) -> None:
    options = {"format": "fp6_e3m2", "overrides": [r"layers\.1\..*(k_proj|up_proj)=int8"]}
    made = packed_models.case("llama", tmp_path, options)
    first, second = models.load(made.packed, "cpu").layers
    assert isinstance(first.attention.qkv, Product) and isinstance(first.attention.qkv.weight, PackedWeight)
    assert first.attention.qkv.weight.shape == (128, 64)
    assert isinstance(first.ffn, FeedForward) and isinstance(first.ffn.up, GatedProduct)
    assert isinstance(second.attention.qkv, Products)
    assert isinstance(second.ffn, FeedForward) and isinstance(second.ffn.up, Activated)


def test_a_packed_embedding_is_one_with_the_head_that_it_is_tied_to(tmp_path: Path) -> None:
    packed_models.compressed(tiny_lm.TINY, tmp_path / "packed", overrides=["embed_tokens=int8:g64"])
    decoder = models.load(tmp_path / "packed", "cpu")
    assert isinstance(decoder.embedding.weight, PackedWeight)
    assert decoder.head.weight is decoder.embedding.weight
    stored = sum(tensor.nbytes for tensor in packed_models.tensors(tmp_path / "packed").values())
    assert decoder.nbytes == pytest.approx(stored, rel=0.01)


TINY_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp6": {"format": "fp6_e3m2"},
    "int4 groups": {"format": "int4", "group_size": 64},
    "mixed": {
        "format": "fp6_e3m2",
        "overrides": ["k_proj=fp8_e4m3", "1.mlp.up_proj=int8", "down_proj=mxfp4_e2m1"],
    },
    "embedding and head": {"format": "fp5_e2m2", "overrides": ["embed_tokens=int8:g64"]},
}


@pytest.mark.parametrize("case", TINY_OPTIONS)
def test_greedy_tokens_of_the_bundled_model_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    path = plain = tiny_lm.TINY
    if TINY_OPTIONS[case]:
        path = packed_models.compressed(tiny_lm.TINY, tmp_path / "packed", **TINY_OPTIONS[case])
        plain = as_float32(tiny_lm.copy(tmp_path / "plain"))
        plain = packed_models.decoded(plain, path, tmp_path / "decoded")
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    prompt = tiny_lm.tokenizer()("In the year 1850 the")["input_ids"]
    with torch.inference_mode():
        wanted = reference.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    assert decoders.greedy(models.load(path, "cpu"), prompt, 16) == wanted[0, len(prompt) :].tolist()


def as_float32(path: Path) -> Path:
    """Widen the tensors of a checkpoint in place, so that decoded weights are not rounded where they are written."""
    for file in path.glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return path


def mixture_of(decoder: models.Decoder, index: int) -> Any:
    """Return the experts of a layer."""
    ffn = decoder.layers[index].ffn
    assert isinstance(ffn, Mixture) and isinstance(ffn.down, StackedWeight)
    return ffn
