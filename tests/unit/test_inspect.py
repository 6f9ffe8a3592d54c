"""`inspect`: what a checkpoint holds, compressed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import checkpoints
from safetensors.torch import save_file

from tersor.checkpoint.inspect import inspect
from tersor.cli import main
from tersor.convert import quantize
from tersor.errors import CheckpointError, InputError
from tersor.integrations.transformers.architecture import read_architecture


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("llama", tmp_path_factory.mktemp("llama") / "model", hidden_size=72, intermediate_size=100)


@pytest.fixture
def packed(llama: Path, tmp_path: Path) -> Path:
    quantize(llama, tmp_path / "out", overrides=["down_proj=uint4:g20"])
    return tmp_path / "out"


def set_quantization(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def test_an_uncompressed_checkpoint(llama: Path) -> None:
    found = inspect(llama, read_architecture)
    tensors = checkpoints.weights(llama)
    assert (found.model, found.architecture, found.method) == ("model", "LlamaForCausalLM", None)
    assert {item.name: (item.shape, item.format, item.nbytes) for item in found.items} == {
        name: (tuple(tensor.shape), "BF16", tensor.nbytes) for name, tensor in tensors.items()
    }
    assert found.bits_per_weight == 16 and found.compressed_bits_per_weight is None
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())


def test_a_compressed_checkpoint(llama: Path, packed: Path) -> None:
    report = quantize(llama, None, overrides=["down_proj=uint4:g20"], dry_run=True)
    rows = {row.name: row for row in report.rows}
    found = inspect(packed, read_architecture)
    assert found.method == "tersor" and found.provenance["algorithm"] == "rtn"
    assert {item.name for item in found.items} == set(rows)
    for item in found.items:
        row = rows[item.name]
        assert item.shape == row.shape and item.nbytes == row.bytes_after
        assert item.format == (row.scheme or row.dtype) and item.compressed == (row.scheme is not None)
        assert item.bits_per_weight == pytest.approx(row.bits_per_weight)
    assert found.nbytes == report.bytes_after
    assert found.compressed_bits_per_weight == pytest.approx(report.bits_per_weight)
    assert json.loads(json.dumps(found.to_dict()))["bytes"] == found.nbytes


def test_experts_and_transposed_layers(tmp_path: Path) -> None:
    for name in ("gpt2", "mixtral"):
        source = checkpoints.save(name, tmp_path / name)
        report = quantize(source, tmp_path / f"{name}-out")
        found = {item.name: item for item in inspect(tmp_path / f"{name}-out", read_architecture).items}
        for row in report.compressed:
            shape = row.shape[::-1] if name == "gpt2" else row.shape
            assert found[row.name].shape == shape and found[row.name].nbytes == row.bytes_after


def test_weights_that_another_method_compressed_are_shown_as_what_they_stand_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = checkpoints.save("llama", tmp_path / "plain", hidden_size=128), tmp_path / "out"
    quantize(source, target, format="int4", group_size=32, export="compressed-tensors")
    found = inspect(target, read_architecture)
    plain = {name: tuple(tensor.shape) for name, tensor in checkpoints.weights(source).items()}
    assert {item.name: item.shape for item in found.items} == plain
    weights = [item for item in found.items if item.compressed]
    assert weights and {item.format for item in weights} == {"compressed-tensors (pack-quantized)"}
    for item in weights:
        # four bits, a scale of two bytes for 32 of them, and the shape in two numbers of eight bytes
        assert item.bits_per_weight == pytest.approx(4 + 16 / 32 + 128 / item.numel)
    assert found.nbytes == sum(tensor.nbytes for tensor in checkpoints.weights(target).values())
    assert main.run(["inspect", str(target), "--zeros"]) == 0
    shown = capsys.readouterr().out
    assert "compressed-tensors (pack-quantized)" in shown and "weight_packed" not in shown


def test_a_method_that_is_not_read_is_shown_as_it_is(packed: Path) -> None:
    set_quantization(packed, quant_method="awq")
    found = inspect(packed, read_architecture)
    assert found.method == "awq"
    assert "model.layers.0.mlp.up_proj.weight_packed" in {item.name for item in found.items}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 6}, "version 6 and this Tersor reads up to version 5: update it"),
        ({"formt": "int4"}, "unknown key 'formt', did you mean 'format'"),
        ({"format": "fp5_e2m2"}, "which is not fp5_e2m2:row:float16 for 72 input channels"),
        ({"ignore": ["up_proj"]}, "up_proj is packed, and quantization_config says to ignore it"),
        ({"overrides": {}}, "has dtype I32 and shape"),
    ],
)
def test_configs_that_contradict_the_tensors(packed: Path, changes: dict[str, Any], message: str) -> None:
    set_quantization(packed, **changes)
    with pytest.raises(InputError, match=message):
        inspect(packed, read_architecture)


def test_a_scale_that_is_missing(packed: Path) -> None:
    tensors = checkpoints.weights(packed)
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight_scale is missing beside"):
        inspect(packed, read_architecture)
