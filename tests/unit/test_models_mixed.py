"""Decoders with mixed weights: the engine's logits, parts of ranks, and kernels that are compiled ahead."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoders, packed_models, tiny_lm
from helpers.fakes import FakeGpu, pretended
from helpers.mixes import SMALL, compressed, levels, plain_weights
from helpers.ranks import together
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import tersor
from tersor import models
from tersor.convert import quantize
from tersor.engine import ahead
from tersor.errors import CheckpointError
from tersor.formats import Assignment
from tersor.kernels import jit
from tersor.kernels.jit import KernelSource
from tersor.layouts import MixedWeight
from tersor.models import Decoder
from tersor.models.weights import Activated, FeedForward, GatedProduct, Product
from tersor.ops.collective import Ranks

gpu = pretended("NVIDIA H200")
LONG = {"max_position_embeddings": 256}


def reference(source: Path, assignments: dict[str, Assignment]) -> Any:
    """Return transformers' model with the decoded weights."""
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    for name, weight in plain_weights(source, assignments).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight.data = weight
    return model


def up_of(decoder: Decoder, layer: int) -> object:
    """Return gate and up of a layer."""
    ffn = decoder.layers[layer].ffn
    assert isinstance(ffn, FeedForward)
    return ffn.up


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gemma2", "opt"])
def test_logits_are_those_of_the_decoded_weights(kind: str, tmp_path: Path) -> None:
    source, mixed, assignments = compressed(kind, tmp_path, **LONG)
    decoder = models.load(mixed, "cpu")
    assert decoders.difference(decoder, reference(source, assignments)) < 1e-4
    qkv = decoder.layers[0].attention.reader
    assert isinstance(qkv, Product) and isinstance(qkv.weight, MixedWeight) and len(qkv.weight.sets) == 3
    assert isinstance(up_of(decoder, 0), GatedProduct) == (kind not in ("phi3", "opt"))


def test_gate_and_up_of_channels_with_several_levels_are_two_products(tmp_path: Path) -> None:
    source, _, assignments = compressed("llama", tmp_path, **LONG)
    name = "model.layers.1.mlp.up_proj"
    assignments[name] = levels(96, seed=77, mix=SMALL)
    quantize(source, tmp_path / "apart", assignments=assignments)
    decoder = models.load(tmp_path / "apart", "cpu")
    assert isinstance(up_of(decoder, 0), GatedProduct) and isinstance(up_of(decoder, 1), Activated)
    assert decoders.difference(decoder, reference(source, assignments)) < 1e-4


def test_gate_and_up_of_one_module_are_one_gated_product_where_levels_agree(tmp_path: Path) -> None:
    source, _, assignments = compressed("phi3", tmp_path, **LONG)
    for name, found in assignments.items():
        if name.endswith("gate_up_proj"):
            half = found.level[: len(found.level) // 2]
            assignments[name] = Assignment(SMALL, half + half)
    quantize(source, tmp_path / "paired", assignments=assignments)
    decoder = models.load(tmp_path / "paired", "cpu")
    assert isinstance(up_of(decoder, 1), GatedProduct)
    assert decoders.difference(decoder, reference(source, assignments)) < 1e-4


def test_ranks_have_parts_of_every_row_set(tmp_path: Path) -> None:
    _, mixed, _ = compressed("qwen2", tmp_path, **LONG, intermediate_size=160)
    text = decoders.texts(96)[1]
    wanted = decoders.whole(models.load(mixed, "cpu"), text)

    def run(ranks: Ranks) -> tuple[torch.Tensor, int]:
        decoder = models.load(mixed, "cpu", ranks=ranks)
        return decoders.whole(decoder, text), decoder.nbytes

    parts = together(2, run)
    for found, _ in parts:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert max(nbytes for _, nbytes in parts) < 0.75 * models.load(mixed, "cpu").nbytes


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_kernels_of_every_row_set_are_compiled_ahead(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _, mixed, _ = compressed(kind, tmp_path, **LONG)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_lm.TINY / name, mixed)
    compiled: set[KernelSource] = set()
    asked: set[KernelSource] = set()
    get = jit.get

    def recording(source: KernelSource, device: Any) -> jit.Function:
        asked.add(source)
        return get(source, device if isinstance(device, int) else -1)

    monkeypatch.setattr(ahead, "compile_many", lambda sources, arch, on_done: compiled.update(sources))
    monkeypatch.setattr(jit, "get", recording)
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "kv_bytes": 8 << 20}
    model = tersor.LLM(mixed, max_rows=4, max_step_tokens=40, max_length=100, **options)
    before = set(compiled)
    params = tersor.SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)
    model.generate([list(range(2, 2 + length)) for length in (1, 20, 37)], params)
    assert {source.name for source in asked - before} == set()
    for scheme in SMALL.levels:
        assert any(scheme.format.name in source.name for source in asked), scheme.key()
        named = [source.name for source in asked if "experts_mixed_sm90" in source.name]
        assert any(scheme.format.name in name for name in named) == (kind == "qwen3_moe")


def test_embeddings_have_one_scheme_and_levels_are_those_of_the_rows_beside_them(tmp_path: Path) -> None:
    _, mixed, _ = compressed("llama", tmp_path, **LONG)
    tensors = packed_models.tensors(mixed)
    tensors["model.embed_tokens.weight_level"] = torch.zeros(96, dtype=torch.uint8)
    save_file(tensors, mixed / "model.safetensors")
    with pytest.raises(CheckpointError, match="embed_tokens is stored mixed, and has one scheme"):
        models.load(mixed, "cpu")
    del tensors["model.embed_tokens.weight_level"]
    tensors["model.layers.0.mlp.up_proj.weight_level"] = torch.zeros(5, dtype=torch.uint8)
    save_file(tensors, mixed / "model.safetensors")
    with pytest.raises(CheckpointError, match="output features by level"):
        models.load(mixed, "cpu")
