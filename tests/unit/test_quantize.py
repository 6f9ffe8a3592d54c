"""`quantize` on one model: options, patterns, shards, companions, and what is written in config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints

import tersor
from tersor.checkpoint import QuantizationConfig
from tersor.convert import quantize
from tersor.formats import Scheme


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("qwen2_moe", tmp_path_factory.mktemp("moe") / "model")


def config_of(directory: Path) -> QuantizationConfig:
    return QuantizationConfig.from_dict(json.loads((directory / "config.json").read_text())["quantization_config"])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "fp6_e2m3:row:float16"),
        ({"format": "fp5_e2m2", "group_size": 32, "scale_dtype": "bfloat16"}, "fp5_e2m2:g32:bfloat16"),
        ({"format": "int4", "group_size": 16}, "int4:g16:float16"),
        ({"format": "uint3", "group_size": 32, "scale_dtype": "float32"}, "uint3:g32:float32"),
        ({"format": "mxfp6_e2m3"}, "fp6_e2m3:g32:e8m0"),
        ({"format": "fp8_e4m3"}, "fp8_e4m3:row:float16"),
    ],
)
def test_schemes(llama: Path, tmp_path: Path, options: dict[str, Any], key: str) -> None:
    report = tersor.quantize(llama, tmp_path / "out", **options)
    assert {row.scheme for row in report.compressed} == {key}
    scheme = Scheme.from_key(key)
    assert config_of(tmp_path / "out").scheme == scheme
    before, after = checkpoints.weights(llama), checkpoints.weights(tmp_path / "out")
    for row in report.compressed:
        weight = before[row.name].float()
        read = checkpoints.decode(after, row.name.removesuffix(".weight"), scheme, row.shape[1])
        assert float((read - weight).norm() / weight.norm()) == pytest.approx(row.relative_error, rel=1e-4)
        assert row.bits_per_weight == pytest.approx(8 * row.bytes_after / weight.numel())
        assert row.bytes_before == before[row.name].nbytes
    assert report.bytes_after == sum(tensor.nbytes for tensor in after.values())


def test_config_json(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "out", format="int4", group_size=32, overrides={"down_proj": "int8"}, ignore=["k_proj"])
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written.pop("quantization_config") == {
        "quant_method": "tersor",
        "version": 1,
        "format": "int4",
        "group_size": 32,
        "scale_dtype": "float16",
        "overrides": {"down_proj": {"format": "int8", "group_size": 32, "scale_dtype": "float16"}},
        "ignore": ["k_proj", "lm_head"],
        "provenance": {"tersor": tersor.__version__, "algorithm": "rtn", "source": "model"},
    }
    assert written == json.loads((llama / "config.json").read_text())


def test_overrides_and_ignore(llama: Path, tmp_path: Path) -> None:
    report = quantize(
        llama,
        tmp_path / "out",
        overrides=[r"layers\.0\..*down=int8:g32", "down|up=int4", "lm_head=fp8_e4m3"],
        ignore=[r"self_attn\.[qk]"],
    )
    schemes = {row.name: row.scheme for row in report.rows}
    notes = {row.name: row.note for row in report.rows}
    assert schemes["model.layers.0.mlp.down_proj.weight"] == "int8:g32:float16"
    assert schemes["model.layers.1.mlp.down_proj.weight"] == "int4:row:float16"
    assert schemes["model.layers.0.mlp.up_proj.weight"] == "int4:row:float16"
    assert schemes["model.layers.0.mlp.gate_proj.weight"] == "fp6_e2m3:row:float16"
    assert schemes["model.layers.0.self_attn.q_proj.weight"] is None
    assert notes["model.layers.0.self_attn.q_proj.weight"] == r"ignored by 'self_attn\\.[qk]'"
    assert schemes["lm_head.weight"] == "fp8_e4m3:row:float16"
    config = config_of(tmp_path / "out")
    assert config.ignore == (r"self_attn\.[qk]",)
    for name, scheme in schemes.items():
        if "proj" in name or "lm_head" in name:
            found = config.resolve(name.removesuffix(".weight"))
            assert (found.key() if found else None) == scheme


def test_a_wide_override_does_not_ask_for_the_head_or_routers(moe: Path, tmp_path: Path) -> None:
    report = quantize(moe, tmp_path / "out", overrides=[".*=int8"])
    skipped = {row.name: row.note for row in report.rows if row.note in ("router", "output head")}
    assert len(skipped) == 5
    config = config_of(tmp_path / "out")
    assert config.resolve("lm_head") is None
    assert config.resolve("model.layers.0.mlp.shared_expert_gate") is None
    assert config.resolve("model.layers.0.mlp.shared_expert.gate_proj").key() == "int8:row:float16"


def test_one_router_asked_for_leaves_the_other_alone(moe: Path, tmp_path: Path) -> None:
    report = quantize(moe, tmp_path / "out", overrides=[r"layers\.0\.mlp\.shared_expert_gate=int8"])
    schemes = {row.name: row.scheme for row in report.rows}
    assert schemes["model.layers.0.mlp.shared_expert_gate.weight"] == "int8:row:float16"
    assert schemes["model.layers.1.mlp.shared_expert_gate.weight"] is None
    config = config_of(tmp_path / "out")
    assert config.resolve("model.layers.0.mlp.shared_expert_gate") is not None
    assert config.resolve("model.layers.1.mlp.shared_expert_gate") is None


def test_shards_and_index(llama: Path, tmp_path: Path) -> None:
    whole = quantize(llama, tmp_path / "one")
    report = quantize(llama, tmp_path / "many", shard_size=10_000)
    assert whole.files == ("model.safetensors",)
    assert len(report.files) > 3
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    one, many = checkpoints.weights(tmp_path / "one"), checkpoints.weights(tmp_path / "many")
    assert list(index["weight_map"]) == sorted(one) and set(index["weight_map"].values()) == set(report.files)
    assert index["metadata"]["total_size"] == report.bytes_after == whole.bytes_after
    assert all(torch.equal(many[name], one[name]) for name in one) and set(one) == set(many)
    for name in report.files:
        assert (tmp_path / "many" / name).stat().st_size < 13_000 or name == index["weight_map"]["lm_head.weight"]
    for stem in {name.rpartition(".")[0] for name in one if "packed" in name}:
        assert index["weight_map"][f"{stem}.weight_packed"] == index["weight_map"][f"{stem}.weight_scale"]


def test_a_sharded_source_gives_the_same(llama: Path, tmp_path: Path) -> None:
    sharded = checkpoints.save("llama", tmp_path / "model", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    quantize(sharded, tmp_path / "a")
    quantize(llama, tmp_path / "b")
    a, b = checkpoints.weights(tmp_path / "a"), checkpoints.weights(tmp_path / "b")
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "a/model.safetensors.index.json").exists()


def test_companions_come_along_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    coming = [
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "modeling_x.py",
        "LICENSE",
        "USE_POLICY.md",
    ]
    staying = [
        "README.md",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        ".hidden.json",
        "model.gguf",
        "run.log",
    ]
    for name in (*coming, *staying):
        (source / name).write_text(f"{name}\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.json").write_text("{}")
    quantize(source, tmp_path / "out")
    written = checkpoints.bytes_of(tmp_path / "out")
    assert set(written) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "README.md",
        "tersor-layers.json",
        "additional_chat_templates/tool.jinja",
        *coming,
    }
    for name in (*coming, "generation_config.json"):
        assert written[name] == (source / name).read_bytes()
    assert written["README.md"].startswith(b"---\nlibrary_name: transformers\ntags:\n- tersor\n- fp6_e2m3\n---\n")


def test_a_dry_run_writes_nothing_and_says_the_same(llama: Path, tmp_path: Path) -> None:
    planned = quantize(llama, tmp_path / "out", format="int5", dry_run=True)
    assert list(tmp_path.iterdir()) == [] and planned.output is None and planned.worst is None
    done = quantize(llama, tmp_path / "out", format="int5")
    pairs = zip(planned.rows, done.rows, strict=True)
    assert all((a.name, a.scheme, a.bytes_after) == (b.name, b.scheme, b.bytes_after) for a, b in pairs)
    assert planned.files == done.files and planned.bytes_after == done.bytes_after


def test_progress_ends_at_the_whole(llama: Path, tmp_path: Path) -> None:
    calls = []
    report = quantize(llama, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[0] == (0, report.bytes_before, "")
    assert calls[-1][:2] == (report.bytes_before, report.bytes_before)
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert report.bytes_read == report.bytes_before


def test_torch_threads_are_given_back(llama: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    quantize(llama, tmp_path / "out")
    assert torch.get_num_threads() == before


def test_rows_and_blocks_do_not_matter(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.convert import pipeline

    quantize(llama, tmp_path / "a", format="uint4", group_size=32)
    monkeypatch.setattr(pipeline, "_CPU_BLOCK_ELEMENTS", 700)
    monkeypatch.setattr(pipeline, "_CACHE_ELEMENTS", 130)
    monkeypatch.setattr(pipeline, "_COPY_BYTES", 1000)
    quantize(llama, tmp_path / "b", format="uint4", group_size=32)
    assert checkpoints.bytes_of(tmp_path / "a") == checkpoints.bytes_of(tmp_path / "b")


def test_input_channels_that_are_no_multiple_of_32(tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model", hidden_size=72, intermediate_size=100, num_attention_heads=2)
    report = quantize(source, tmp_path / "out", format="fp5_e2m2")
    before, after = checkpoints.weights(source), checkpoints.weights(tmp_path / "out")
    for row in report.compressed:
        weight = before[row.name].float()
        read = checkpoints.decode(after, row.name.removesuffix(".weight"), Scheme.from_key(row.scheme), row.shape[1])
        assert float((read - weight).norm() / weight.norm()) == pytest.approx(row.relative_error, rel=1e-4)


def test_a_hub_id_is_downloaded(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.append((name, kw)) or str(llama))
    report = quantize("someone/some-model", tmp_path / "out")
    assert report.source == "someone/some-model" and asked[0][0] == "someone/some-model"
    assert "[!0-9]*.bin" in asked[0][1]["ignore_patterns"]
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: someone/some-model\nbase_model_relation: quantized\n" in card
    assert config_of(tmp_path / "out").provenance["source"] == "someone/some-model"
