"""Checkpoints that others compressed are decoded exactly, and compress to what the plain model compresses to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import checkpoints, released
from safetensors.torch import save_file

from tersor.checkpoint.header import TensorSpec
from tersor.checkpoint.reader import SafetensorsFile
from tersor.checkpoint.released import DecodedTensor, read_released
from tersor.checkpoint.source import open_source
from tersor.convert import quantize


@pytest.mark.parametrize("case", released.CASES)
def test_a_released_checkpoint_is_decoded_and_compressed_like_the_plain_one(case: str, tmp_path: Path) -> None:
    settings, compress = released.CASES[case]
    packed, plain = released.save(tmp_path, settings, compress)
    found, expected = released.decoded(packed), checkpoints.weights(plain)
    assert len(found) == 14
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
    report = quantize(packed, tmp_path / "out")
    quantize(plain, tmp_path / "expected", sparse="off")
    released.same(tmp_path / "out", tmp_path / "expected")
    assert report.source_method.startswith(settings["quant_method"])
    assert report.bytes_before == sum(
        tensor.nbytes for name, tensor in checkpoints.weights(packed).items() if not name.endswith("input_scale")
    )
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "expected"))
    assert ours["quantization_config"]["provenance"].pop("source_method") == report.source_method
    assert ours == theirs
    assert report.source_method in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("model", ["deepseek_v3", "qwen3_moe"])
def test_experts_that_are_stored_one_by_one_are_compressed_like_plain_ones(model: str, tmp_path: Path) -> None:
    packed, plain = released.save(tmp_path, *released.CASES["fp8 blocks"], model)
    report = quantize(packed, tmp_path / "out")
    quantize(plain, tmp_path / "expected", sparse="off")
    released.same(tmp_path / "out", tmp_path / "expected")
    assert any(".experts.3." in row.name for row in report.compressed)


@pytest.mark.parametrize("case", ["fp8 blocks", "gptq 4", "awq", "nf4", "nvfp4"])
def test_of_a_weight_only_the_rows_that_are_wanted_are_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = released.save(tmp_path, *released.CASES[case])
    count = 0
    read_into = SafetensorsFile.read_into

    def counted(file: SafetensorsFile, spec: TensorSpec, start: int, buffer: memoryview) -> None:
        nonlocal count
        count += buffer.nbytes
        read_into(file, spec, start, buffer)

    with open_source(packed) as source:
        found = read_released(source)
        assert found is not None
        tensor = found.tensors["model.layers.0.mlp.up_proj.weight"]
        assert isinstance(tensor, DecodedTensor)
        monkeypatch.setattr(SafetensorsFile, "read_into", counted)
        assert tensor.read_rows(8, 16).shape == (8, 64)
    assert 0 < count < tensor.nbytes / 3


def test_layers_left_alone_are_written_in_the_models_dtype(tmp_path: Path) -> None:
    packed, plain = released.save(tmp_path, *released.CASES["fp8 blocks"])
    quantize(packed, tmp_path / "out", ignore=["down_proj"])
    name = "model.layers.1.mlp.down_proj.weight"
    written = checkpoints.weights(tmp_path / "out")[name]
    assert written.dtype == torch.bfloat16
    assert torch.equal(written, checkpoints.weights(plain)[name].to(torch.bfloat16))


def test_experts_of_three_axes_are_decoded_each_with_its_own_scales(tmp_path: Path) -> None:
    packed, _ = released.save(tmp_path, *released.CASES["fp8 blocks"])
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 40, 64, generator=generator).to(torch.float8_e4m3fn)
    blocks, each = torch.rand(3, 1, 2, generator=generator), torch.rand(3, generator=generator)
    extra = {"a.experts.up": codes, "a.experts.up_scale_inv": blocks, "a.experts.down": codes.clone()}
    extra["a.experts.down_scale"] = each
    path = packed / "model.safetensors"
    save_file({**checkpoints.load(path), **extra}, path, {"format": "pt"})
    found = released.decoded(packed, 2)
    grid = blocks.repeat_interleave(48, 1)[:, :40].repeat_interleave(40, 2)[:, :, :64]
    assert torch.equal(found["a.experts.up"], codes.float() * grid)
    assert torch.equal(found["a.experts.down"], codes.float() * each[:, None, None])


def test_experts_in_four_bits_among_fp8_have_a_scale_for_each_32(tmp_path: Path) -> None:
    packed, _ = released.save(tmp_path, *released.CASES["fp8 blocks"])
    codes = torch.arange(16 * 32, dtype=torch.int32).remainder(256).to(torch.uint8).view(16, 32)
    scales = torch.full((16, 2), 126, dtype=torch.uint8)
    scales[3, 1] = 130
    path = packed / "model.safetensors"
    extra = {"a.w1.weight": codes.view(torch.int8), "a.w1.scale": scales.view(torch.float8_e8m0fnu)}
    save_file({**checkpoints.load(path), **extra}, path, {"format": "pt"})
    expected = torch.stack([released.FP4[codes.long() % 16], released.FP4[codes.long() // 16]], -1).view(16, 64) / 2
    expected[3, 32:] *= 16
    assert torch.equal(released.decoded(packed)["a.w1.weight"], expected)


def test_a_plain_checkpoint_is_none_that_others_compressed(tmp_path: Path) -> None:
    with open_source(checkpoints.save("llama", tmp_path / "model")) as source:
        assert read_released(source) is None


def test_a_compressed_checkpoint_is_taken_up_where_an_interrupted_run_left_it(tmp_path: Path) -> None:
    packed, plain = released.save(tmp_path, *released.CASES["gptq 4"])

    def stop(done: int, total: int, name: str) -> None:
        assert 0 <= done <= total
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(packed, tmp_path / "out", shard_size=30_000, progress=stop)
    quantize(packed, tmp_path / "out", shard_size=30_000, resume=True)
    quantize(plain, tmp_path / "expected", sparse="off")
    released.same(tmp_path / "out", tmp_path / "expected")


def test_a_dry_run_reads_no_weight_and_names_the_method(tmp_path: Path) -> None:
    packed, _ = released.save(tmp_path, *released.CASES["nf4 nested"])
    report = quantize(packed, None, dry_run=True)
    assert report.source_method == "bitsandbytes"
    assert report.to_dict()["source_method"] == "bitsandbytes"
    assert len(report.compressed) == 14


def test_scales_may_be_in_another_file_than_their_weight(tmp_path: Path) -> None:
    packed, plain = released.save(tmp_path, *released.CASES["fp8 blocks"])
    tensors = checkpoints.weights(packed)
    (packed / "model.safetensors").unlink()
    scales = {name: tensor for name, tensor in tensors.items() if "scale" in name}
    files = {"b.safetensors": scales, "a.safetensors": {name: tensors[name] for name in tensors.keys() - scales.keys()}}
    for name, part in files.items():
        save_file(part, packed / name, {"format": "pt"})
    weight_map = {tensor: name for name, part in files.items() for tensor in part}
    (packed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    quantize(packed, tmp_path / "out")
    quantize(plain, tmp_path / "expected", sparse="off")
    released.same(tmp_path / "out", tmp_path / "expected")
