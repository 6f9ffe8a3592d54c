"""Checkpoints whose rows have tables: written, listed, loaded through transformers and run by the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, checkpoints, decoders, interrupted, packed_models
from helpers.ranks import together
from helpers.usage import refused_in_one_line
from transformers import AutoModelForCausalLM

from tersor import models
from tersor.checkpoint.inspect import inspect
from tersor.checkpoint.source import open_source
from tersor.compress import encode
from tersor.convert import quantize
from tersor.errors import InputError, UnsupportedError
from tersor.formats import Scheme, get_scheme
from tersor.hardware import CHIPS
from tersor.integrations.transformers import TersorConfig, fuse
from tersor.integrations.transformers.architecture import read_architecture
from tersor.integrations.transformers.replace import multiply_with, unpack_model
from tersor.models.kernels import Steps, kernels_of
from tersor.models.load import described
from tersor.models.outline import outline
from tersor.ops.collective import Ranks

LONG = {"max_position_embeddings": 256}
OPTIONS: dict[str, Any] = {"format": "lut3"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_models.plain("llama", tmp_path_factory.mktemp("llama") / "model", torch.bfloat16, **LONG)


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "out"
    quantize(source, output, **OPTIONS)
    return output


def test_a_checkpoint_stores_tables_in_the_models_dtype_and_counts_their_bytes(source: Path, packed: Path) -> None:
    name, scheme = "model.layers.0.mlp.down_proj", get_scheme("lut3", None, "bfloat16")
    stored, weight = packed_models.tensors(packed), checkpoints.weights(source)[f"{name}.weight"]
    encoded = encode(weight, scheme)
    table = stored[f"{name}.weight_scale"]
    assert table.dtype == torch.bfloat16 and table.shape == (64, 8) and torch.equal(table, encoded.scale)
    items = {item.name: item for item in inspect(packed, read_architecture).items}
    item = items[f"{name}.weight"]
    assert item.format == "lut3:row:bfloat16" and item.nbytes == 64 * (96 * 3 // 8 + 16)
    assert item.bits_per_weight == pytest.approx(scheme.bits_per_weight(96)) == 3 + 128 / 96
    report = quantize(source, dry_run=True, **OPTIONS)
    assert {row.name: row.bytes_after for row in report.rows} == {one.name: one.nbytes for one in items.values()}
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["version"] == 5
    assert "lut3 codes with one bfloat16 table a row, rounded to nearest" in (packed / "README.md").read_text()


def test_a_dtype_that_is_asked_for_is_taken_and_floats_of_32_bits_have_tables_of_16(
    source: Path, tmp_path: Path
) -> None:
    report = quantize(source, dry_run=True, **OPTIONS, scale_dtype="float16")
    assert report.scheme == "lut3:row:float16"
    wide = packed_models.plain("llama", tmp_path / "wide", torch.float32, **LONG)
    assert quantize(wide, dry_run=True, **OPTIONS).scheme == "lut3:row:float16"
    overridden = quantize(source, dry_run=True, format="int4", group_size=32, overrides=["down_proj=lut3:row"])
    assert {row.scheme for row in overridden.compressed} == {"int4:g32:float16", "lut3:row:bfloat16"}


@pytest.mark.parametrize(
    ("dtype", "options", "wanted"),
    [
        (torch.bfloat16, {}, "bfloat16"),
        (torch.float16, {}, "float16"),
        (torch.float32, {}, "float16"),
        (torch.bfloat16, {"scale_dtype": "float16"}, "float16"),
    ],
    ids=["of the model", "of another model", "of 32 bits", "asked for"],
)
def test_tables_that_are_made_while_loading_meet_activations_of_their_dtype(
    source: Path, dtype: torch.dtype, options: dict[str, Any], wanted: str
) -> None:
    config = TersorConfig(format="int4", group_size=32, overrides={"down_proj": "lut3:row"}, **options)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)
    assert model.get_submodule("model.layers.0.mlp.down_proj").scheme.key() == f"lut3:row:{wanted}"
    assert model.get_submodule("model.layers.0.mlp.up_proj").scheme.key() == "int4:g32:float16"
    assert model.config.quantization_config.parsed.overrides[0].scheme.scale_dtype == wanted
    whole = TersorConfig(format="lut3", **options).beside(dtype).scheme
    assert isinstance(whole, Scheme) and whole.scale_dtype == wanted


def test_a_model_loads_runs_and_is_saved_as_it_was(packed: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    with torch.inference_mode():
        found = model(packed_models.token_ids()).logits
    model.save_pretrained(tmp_path / "saved")
    before, after = packed_models.tensors(packed), packed_models.tensors(tmp_path / "saved")
    names = [name for name in before if ".weight_" in name]
    assert all(torch.equal(before[name], after[name]) for name in names) and before.keys() == after.keys()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        fuse.fuse(model)
        torch.testing.assert_close(model(packed_models.token_ids()).logits, found, rtol=1e-4, atol=1e-4)
    assert packed_models.same(model.state_dict(), state)
    decoded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    unpack_model(decoded, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(decoded(packed_models.token_ids()).logits, found, rtol=1e-4, atol=1e-4)


def test_a_module_in_memory_is_compressed_to_the_same(source: Path, packed: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    assert {row.scheme for row in quantize(model, **OPTIONS).compressed} == {"lut3:row:bfloat16"}
    model.save_pretrained(tmp_path / "saved")
    assert packed_models.same(packed_models.tensors(tmp_path / "saved"), packed_models.tensors(packed))


@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("outliers", [None, "3%"])
def test_the_engine_gives_the_logits_of_the_decoded_weights(kind: str, outliers: str | None, tmp_path: Path) -> None:
    if kind == "mixtral" and outliers:
        pytest.skip("experts keep no outliers")
    case = packed_models.case(kind, tmp_path, {**OPTIONS, "outliers": outliers}, **LONG)
    model: Any = AutoModelForCausalLM.from_pretrained(case.packed, attn_implementation="eager", dtype=torch.float32)
    unpack_model(model.eval(), torch.float32)
    assert decoders.difference(models.load(case.packed, "cpu"), model) < 1e-4


@pytest.mark.parametrize("kind", ["gpt_oss", "llama"])
def test_experts_in_one_tensor_and_embeddings_have_tables(kind: str, tmp_path: Path) -> None:
    path = checkpoints.save(kind, tmp_path / "model")
    quantize(path, tmp_path / "out", format="lut3", overrides=["embed_tokens=lut3"])
    stored = packed_models.tensors(tmp_path / "out")
    assert stored["model.embed_tokens.weight_scale"].shape[1] == 8
    if kind == "gpt_oss":
        assert {stored[name].shape[2] for name in stored if "experts" in name and name.endswith("_scale")} == {8}
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.inference_mode():
        found = model(packed_models.token_ids()).logits
        unpack_model(model, torch.float32)
        torch.testing.assert_close(model(packed_models.token_ids()).logits, found, rtol=1e-4, atol=1e-4)


def test_8_bit_activations_meet_no_tables(packed: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="tables of lut3 have 16-bit floats, which meet no bytes"):
        multiply_with(model, "fp8")
    with pytest.raises(UnsupportedError, match="activations int8 with weights in lut3:row:bfloat16: tables"):
        models.load(packed, "cpu", activations="int8")


def test_ranks_have_the_whole_tables_of_their_rows(tmp_path: Path) -> None:
    changes = {"head_dim": 32, "intermediate_size": 160}
    path = packed_models.case("llama", tmp_path, OPTIONS, **LONG, **changes).packed
    text = decoders.texts(96)[1]
    wanted = decoders.whole(models.load(path, "cpu", dtype=torch.float32), text)

    def run(ranks: Ranks) -> torch.Tensor:
        return decoders.whole(models.load(path, "cpu", ranks=ranks, dtype=torch.float32), text)

    for found in together(2, run):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_kernels_of_an_engine_are_those_of_its_dtype_or_none(packed: Path) -> None:
    steps = Steps(tokens=8, rows=8, queries=8, length=64)
    with open_source(packed) as opened:
        config, names, _, forms = described(opened)
    for dtype, served in ((torch.bfloat16, True), (torch.float16, False)):
        parts = outline(config, names, forms, dtype)
        asked = {source.name for source in kernels_of(parts, steps, CHIPS["NVIDIA H200"])}
        assert any("linear_sm90_lut3" in name for name in asked) is served


def test_small_blocks_and_an_interruption_give_the_same_bytes(
    source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.convert.pipeline._CPU_BLOCK_ELEMENTS", 500)

    with pytest.raises(interrupted.Stopped):
        quantize(source, tmp_path / "out", **OPTIONS, shard_size=12_000, progress=interrupted.after(0.5))
    with pytest.raises(InputError, match="scale_dtype"):
        quantize(source, tmp_path / "out", **OPTIONS, scale_dtype="float16", shard_size=12_000, resume=True)
    quantize(source, tmp_path / "out", **OPTIONS, shard_size=12_000, resume=True)
    assert packed_models.same(packed_models.tensors(tmp_path / "out"), packed_models.tensors(packed))


def test_a_calibrated_checkpoint_goes_on_after_an_interruption(tmp_path: Path) -> None:
    model = calibrated.model("llama", tmp_path / "model")
    text = calibrated.text(tmp_path / "text.txt")
    options = {**calibrated.OPTIONS, "format": "lut3", "group_size": None, "calibration": text}

    report = quantize(model, tmp_path / "whole", **options)
    with pytest.raises(interrupted.Stopped):
        quantize(model, tmp_path / "out", **options, progress=interrupted.at_call(4))
    quantize(model, tmp_path / "out", **options, resume=True)
    stored = packed_models.tensors(tmp_path / "whole")
    assert packed_models.same(packed_models.tensors(tmp_path / "out"), stored)
    assert {row.scheme for row in report.compressed} == {"lut3:row:float16"}
    nearest = quantize(model, tmp_path / "nearest", format="lut3")
    pairs = zip(nearest.compressed, report.compressed, strict=True)  # what counts is the error of the outputs
    assert all((one.relative_error or 0) < (other.relative_error or 0) for one, other in pairs)


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "lut3", "--group-size", "64"], "lut3 has a table for each row, no groups of 64"),
        (["--format", "lut3", "--scale-dtype", "float32"], "tables of lut3 are float16 or bfloat16, not float32"),
        (["--format", "lut4"], "unknown format 'lut4', did you mean 'lut3'"),
        (["--level", "lut3", "--level", "int8", "--target-bits", "6"], "output features of a mix have no tables"),
        (["--format", "lut3", "--export", "humming"], "humming cannot say lut3 with one table a row in bfloat16"),
        (["--format", "lut3", "--export", "compressed-tensors"], "compressed-tensors cannot say lut3"),
        (["--format", "lut3", "--export", "quark"], "quark cannot say lut3"),
    ],
)
def test_what_has_no_tables_is_said_in_one_line_before_the_work(
    source: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calibration = ["--calibration", str(calibrated.text(tmp_path / "text.txt"))] if "--level" in words else []
    calibration += ["--algorithm", "gptq"] if calibration else []
    command = ["quantize", str(source), "-o", str(tmp_path / "out"), *words, *calibration]
    refused_in_one_line(command, 2, message, monkeypatch, capsys)
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


def test_pruning_takes_no_tables(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", str(source), "-o", str(tmp_path / "out"), "--sparsity", "0.5", "--algorithm", "magnitude"]
    message = "pruned weights have no tables: use another format than lut3"
    refused_in_one_line([*command, "--values", "lut3"], 2, message, monkeypatch, capsys)
    assert not (tmp_path / "out").exists()
