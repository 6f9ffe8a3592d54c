"""Which tensors of which architecture are compressed, and to which values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints
from safetensors.torch import save_file

from tersor.checkpoint import QuantizationConfig
from tersor.compress import quantize_rtn
from tersor.convert import quantize
from tersor.formats import Scheme, scale_values

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LLAMA = (*ATTENTION, *GATED)


def experts(parent: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{parent}.experts.{index}.{name}" for index in range(4) for name in names)


DEEPSEEK = (
    tuple(f"self_attn.{name}" for name in LATENT),
    GATED,
    (
        *experts("mlp", ("gate_proj", "up_proj", "down_proj")),
        *(name.replace("mlp", "mlp.shared_experts") for name in GATED),
    ),
)
LINEARS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), ("model.layers.{}.", LLAMA)
    ),
    "phi": ("model.layers.{}.", (*ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")),
    "phi3": ("model.layers.{}.", ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    "opt": ("model.decoder.layers.{}.", (*ATTENTION[:3], "self_attn.out_proj", "fc1", "fc2")),
    "gpt_neox": (
        "gpt_neox.layers.{}.",
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "falcon": (
        "transformer.h.{}.",
        ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "gpt2": ("transformer.h.{}.", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    "mixtral": ("model.layers.{}.", (*ATTENTION, *experts("block_sparse_moe", ("w1", "w2", "w3")))),
    "qwen2_moe": (
        "model.layers.{}.",
        (
            *ATTENTION,
            *experts("mlp", ("gate_proj", "up_proj", "down_proj")),
            *(name.replace("mlp", "mlp.shared_expert") for name in GATED),
        ),
    ),
    **dict.fromkeys(
        ("qwen3_moe", "olmoe"),
        ("model.layers.{}.", (*ATTENTION, *experts("mlp", ("gate_proj", "up_proj", "down_proj")))),
    ),
}


def expected(name: str) -> set[str]:
    """The compressed weights of a two-layer model."""
    if name.startswith("deepseek"):
        attention, dense, sparse = DEEPSEEK
        first, second = (*attention, *dense), (*attention, *sparse)
        return {f"model.layers.{index}.{part}.weight" for index, parts in ((0, first), (1, second)) for part in parts}
    prefix, parts = LINEARS[name]
    return {f"{prefix.format(index)}{part}.weight" for index in range(2) for part in parts}


@pytest.mark.parametrize("name", checkpoints.CONFIGS)
def test_linears_are_compressed_and_nothing_else(name: str, tmp_path: Path) -> None:
    source = checkpoints.save(name, tmp_path / "model")
    report = quantize(source, tmp_path / "out", format="fp6_e3m2")
    assert {row.name for row in report.compressed} == expected(name)
    before, after = checkpoints.weights(source), checkpoints.weights(tmp_path / "out")
    config = QuantizationConfig.from_dict(json.loads((tmp_path / "out/config.json").read_text())["quantization_config"])
    worst = {}
    for row in report.rows:
        if row.scheme is None:
            assert torch.equal(after.pop(row.name), before[row.name])
            continue
        stem = row.name.removesuffix(".weight")
        weight = before[row.name].T if name == "gpt2" else before[row.name]
        scheme = Scheme.from_key(row.scheme)
        assert config.resolve(stem) == scheme
        encoded = quantize_rtn(weight, scheme)
        wanted = scheme.format.decode(encoded.codes) * scale_values(encoded.scale, scheme)
        read = checkpoints.decode(after, stem, scheme, weight.shape[1])
        assert torch.equal(read, wanted)
        worst[row.name] = float((read - weight.float()).norm() / weight.float().norm())
        assert row.relative_error == pytest.approx(worst[row.name], rel=1e-4)
        assert {f"{stem}.weight_packed", f"{stem}.weight_scale"} <= set(after)
        del after[f"{stem}.weight_packed"], after[f"{stem}.weight_scale"]
    assert after == {}
    assert report.worst is not None and report.worst.relative_error == pytest.approx(max(worst.values()), rel=1e-4)
    assert 0.01 < report.worst.relative_error < 0.1


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("llama", {"lm_head.weight": "output head", "model.embed_tokens.weight": "embedding", "model.norm.weight": ""}),
        ("gpt2", {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "embedding"}),
        ("gpt_neox", {"embed_out.weight": "output head", "gpt_neox.embed_in.weight": "embedding"}),
        ("mixtral", {"model.layers.0.block_sparse_moe.gate.weight": "router"}),
        (
            "qwen2_moe",
            {"model.layers.0.mlp.gate.weight": "router", "model.layers.0.mlp.shared_expert_gate.weight": "router"},
        ),
        ("deepseek_v3", {"model.layers.1.mlp.gate.weight": "router"}),
    ],
)
def test_what_is_left_alone_is_said(name: str, notes: dict[str, Any], tmp_path: Path) -> None:
    rows = {row.name: row for row in quantize(checkpoints.save(name, tmp_path / "model"), None, dry_run=True).rows}
    assert {tensor: rows[tensor].note for tensor in notes} == notes


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("llama", "model."), ("qwen3_moe", "model.")]
)
def test_names_of_the_base_model_are_understood(name: str, prefix: str, tmp_path: Path) -> None:
    """Checkpoints of the model without its head lack the first part of every name; patterns see it all the same."""
    source = checkpoints.save(name, tmp_path / "model")
    bare = {tensor.removeprefix(prefix): value for tensor, value in checkpoints.weights(source).items()}
    save_file(bare, source / "model.safetensors", {"format": "pt"})
    report = quantize(source, tmp_path / "out", ignore=[rf"^{prefix}(decoder\.)?(layers|h)\.1\."])
    assert {prefix + row.name for row in report.compressed} == {
        tensor for tensor in expected(name) if "layers.1." not in tensor and "h.1." not in tensor
    }
    assert f"{report.compressed[0].name.removesuffix('.weight')}.weight_packed" in checkpoints.weights(tmp_path / "out")


def test_experts_that_are_stored_fused_are_compressed_each_on_its_own(tmp_path: Path) -> None:
    source = checkpoints.save("qwen3_moe", tmp_path / "model")
    tensors = {tensor: value for tensor, value in checkpoints.weights(source).items() if ".mlp.experts." not in tensor}
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.randn(4, 64, 64, dtype=torch.bfloat16)
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.randn(4, 64, 32, dtype=torch.bfloat16)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = quantize(source, tmp_path / "out")
    after = checkpoints.weights(tmp_path / "out")
    fused = [row for row in report.rows if ".experts." in row.name]
    assert [(row.scheme, row.note, row.linear) for row in fused] == [("fp6_e2m3:row:float16", "", True)] * 4
    assert len(report.compressed) == 12
    for row in fused:
        scheme, weights = Scheme.from_key(str(row.scheme)), tensors[row.name]
        for expert, weight in enumerate(weights):
            encoded = quantize_rtn(weight, scheme)
            stored = {f"a.{name}": after[f"{row.name}.{name}"][expert] for name in ("weight_packed", "weight_scale")}
            read = checkpoints.decode(stored, "a", scheme, weight.shape[1])
            assert torch.equal(read, scheme.format.decode(encoded.codes) * scale_values(encoded.scale, scheme))


def test_layers_beyond_the_model_stay(tmp_path: Path) -> None:
    """DeepSeek-V3 checkpoints hold a layer for speculation that the model does not have."""
    source = checkpoints.save("deepseek_v3", tmp_path / "model")
    tensors = checkpoints.weights(source)
    extra = {
        name.replace("layers.1.", "layers.2."): value.clone() for name, value in tensors.items() if "layers.1." in name
    }
    save_file({**tensors, **extra}, source / "model.safetensors", {"format": "pt"})
    report = quantize(source, None, dry_run=True)
    assert {row.name for row in report.compressed} == expected("deepseek_v3")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes_of_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model", num_hidden_layers=1)
    tensors = {name: value.to(dtype) for name, value in checkpoints.weights(source).items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = quantize(source, tmp_path / "out", format="int8")
    after = checkpoints.weights(tmp_path / "out")
    for row in report.compressed:
        read = checkpoints.decode(after, row.name.removesuffix(".weight"), Scheme.from_key(row.scheme), row.shape[1])
        assert float((read - tensors[row.name]).abs().max()) <= float(tensors[row.name].abs().max()) / 127
    assert after["model.norm.weight"].dtype == dtype
