"""Checkpoints whose weights keep outliers: written, listed, loaded through transformers and run by the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, checkpoints, decoders, interrupted, packed_models
from helpers.ranks import together
from helpers.usage import refused_in_one_line
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tersor
from tersor import formats, models
from tersor.checkpoint.inspect import inspect
from tersor.checkpoint.source import open_source
from tersor.compress import encode
from tersor.convert import quantize
from tersor.errors import CheckpointError, InputError, TersorError
from tersor.formats import Assignment, Mix, get_scheme
from tersor.hardware import CHIPS
from tersor.integrations.transformers import fuse
from tersor.integrations.transformers.architecture import read_architecture
from tersor.integrations.transformers.replace import unpack_model
from tersor.layouts import PackedWeight
from tersor.models.kernels import Steps, kernels_of
from tersor.models.load import described
from tersor.models.outline import outline
from tersor.models.weights import Activated, FeedForward, Product
from tersor.nn import PackedLinear
from tersor.ops.collective import Ranks

LONG = {"max_position_embeddings": 256}
OPTIONS: dict[str, Any] = {"format": "uint4", "group_size": 32, "outliers": "3%"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_models.plain("llama", tmp_path_factory.mktemp("llama") / "model", torch.bfloat16, **LONG)


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "out"
    quantize(source, output, **OPTIONS)
    return output


def test_a_checkpoint_stores_what_a_recipe_chose_and_counts_its_bytes(source: Path, packed: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    stored, weight = packed_models.tensors(packed), checkpoints.weights(source)[f"{name}.weight"]
    scheme = get_scheme("uint4", 32)
    scheme = formats.Scheme(scheme.format, 32, "float16", formats.Outliers(3, "bfloat16"))
    encoded = encode(weight, scheme)
    assert encoded.outliers is not None and torch.equal(stored[f"{name}.weight_outliers"], encoded.outliers)
    assert torch.equal(stored[f"{name}.weight_scale"], encoded.scale)
    items = {item.name: item for item in inspect(packed, read_architecture).items}
    item = items[f"{name}.weight"]
    assert item.format == "uint4:g32:float16:3%:bfloat16" == scheme.key()
    assert item.nbytes == sum(tensor.nbytes for key, tensor in stored.items() if key.startswith(f"{name}."))
    assert item.bits_per_weight == pytest.approx(scheme.bits_per_weight(96))
    report = quantize(source, dry_run=True, **OPTIONS)
    assert {row.name: row.bytes_after for row in report.rows} == {one.name: one.nbytes for one in items.values()}
    said = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (said["version"], said["outliers"]) == (4, {"percent": 3.0, "dtype": "bfloat16"})
    assert "and 3 % of every row kept in bfloat16, rounded to nearest" in (packed / "README.md").read_text()


def test_a_model_loads_runs_and_is_saved_as_it_was(source: Path, packed: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    layer = model.model.layers[0].mlp.down_proj
    plain = checkpoints.weights(source)["model.layers.0.mlp.down_proj.weight"]
    assert int((layer.weight == plain.float()).sum(dim=1).min()) >= 3
    with torch.inference_mode():
        found = model(packed_models.token_ids()).logits
    model.save_pretrained(tmp_path / "saved")
    before, after = packed_models.tensors(packed), packed_models.tensors(tmp_path / "saved")
    names = [name for name in before if ".weight_" in name]
    assert all(torch.equal(before[name], after[name]) for name in names) and before.keys() == after.keys()
    decoded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    unpack_model(decoded, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(decoded(packed_models.token_ids()).logits, found, rtol=1e-4, atol=1e-4)
    assert tersor.nn.bits_per_weight(model) == pytest.approx(
        inspect(packed, read_architecture).compressed_bits_per_weight
    )


def test_joined_layers_keep_their_outliers(packed: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode():
        expected = model(packed_models.token_ids()).logits
        fuse.fuse(model)
        torch.testing.assert_close(model(packed_models.token_ids()).logits, expected, rtol=1e-4, atol=1e-4)
    assert packed_models.same(model.state_dict(), before)


def test_a_module_in_memory_is_compressed_to_the_same(source: Path, packed: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    report = quantize(model, **OPTIONS)
    assert {row.scheme for row in report.compressed} == {"uint4:g32:float16:3%:bfloat16"}
    model.save_pretrained(tmp_path / "saved")
    assert packed_models.same(packed_models.tensors(tmp_path / "saved"), packed_models.tensors(packed))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "opt"])
def test_the_engine_gives_the_logits_of_the_decoded_weights(kind: str, tmp_path: Path) -> None:
    case = packed_models.case(kind, tmp_path, OPTIONS, **LONG)
    model: Any = AutoModelForCausalLM.from_pretrained(case.packed, attn_implementation="eager", dtype=torch.float32)
    unpack_model(model.eval(), torch.float32)
    decoder = models.load(case.packed, "cpu")
    assert decoders.difference(decoder, model) < 1e-4
    reader, ffn = decoder.layers[0].attention.reader, decoder.layers[0].ffn
    assert isinstance(reader, Product) and isinstance(reader.weight, PackedWeight)
    assert reader.weight.outliers is not None
    assert isinstance(ffn, FeedForward) and isinstance(ffn.up, Activated)  # a gate comes after outliers
    held = sum(tensor.nbytes for tensor in decoder.tensors())
    stored = packed_models.tensors(case.packed)
    assert held >= sum(tensor.nbytes for name, tensor in stored.items() if name.endswith(("outliers", "packed")))


@pytest.mark.parametrize(("name", "count"), [("llama", 3), ("qwen2", 2)])
def test_ranks_have_the_outliers_of_their_rows_and_columns(name: str, count: int, tmp_path: Path) -> None:
    changes = {"head_dim": 32, "intermediate_size": 160} if name == "llama" else {}
    path = packed_models.case(name, tmp_path, OPTIONS, **LONG, **changes).packed
    text = decoders.texts(96)[1]
    wanted = decoders.whole(models.load(path, "cpu", dtype=torch.float32), text)

    def run(ranks: Ranks) -> torch.Tensor:
        return decoders.whole(models.load(path, "cpu", ranks=ranks, dtype=torch.float32), text)

    for found in together(count, run):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_kernels_of_an_engine_are_known_before_weights_are_read(packed: Path) -> None:
    steps = Steps(tokens=8, rows=8, queries=8, length=64)
    with open_source(packed) as opened:
        config, names, _, forms = described(opened)
    parts = outline(config, names, forms, torch.bfloat16)
    asked = {source.name for source in kernels_of(parts, steps, CHIPS["NVIDIA H200"])}
    adding = {name for name in asked if name.startswith("tersor_linear")}
    assert adding and all("_beside" in name for name in adding)  # but for the head, which is not packed
    assert not any(name.startswith("tersor_outlier_sums") for name in asked)
    assert not any("norm_in" in name or "norm_out" in name for name in asked)  # outliers read what a norm returns
    assert not any(name.startswith("tersor_linear") and "gated" in name for name in asked)


def test_small_blocks_and_an_interruption_give_the_same_bytes(
    source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tersor.convert.pipeline._CPU_BLOCK_ELEMENTS", 500)

    with pytest.raises(interrupted.Stopped):
        quantize(source, tmp_path / "out", **OPTIONS, shard_size=12_000, progress=interrupted.after(0.5))
    with pytest.raises(InputError, match="outliers"):
        quantize(source, tmp_path / "out", **{**OPTIONS, "outliers": "2%"}, shard_size=12_000, resume=True)
    quantize(source, tmp_path / "out", **OPTIONS, shard_size=12_000, resume=True)
    assert packed_models.same(packed_models.tensors(tmp_path / "out"), packed_models.tensors(packed))


def test_a_calibrated_checkpoint_keeps_what_loses_most_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    model = calibrated.model("llama", tmp_path / "model")
    text = calibrated.text(tmp_path / "text.txt")
    options = {**calibrated.OPTIONS, "outliers": "3%", "calibration": text}

    quantize(model, tmp_path / "whole", **options)
    with pytest.raises(interrupted.Stopped):
        quantize(model, tmp_path / "out", **options, progress=interrupted.at_call(4))
    quantize(model, tmp_path / "out", **options, resume=True)
    stored = packed_models.tensors(tmp_path / "whole")
    assert packed_models.same(packed_models.tensors(tmp_path / "out"), stored)
    name = "model.layers.1.mlp.down_proj"
    plain = checkpoints.weights(model)[f"{name}.weight"]
    words = stored[f"{name}.weight_outliers"]
    kept = plain.gather(1, formats.outlier_columns(words)).half()  # a model in float32 has them in float16
    assert torch.equal(formats.outlier_values(words, "float16"), kept)
    largest = plain.abs().topk(3, dim=1).indices.sort(dim=1).values
    assert not torch.equal(formats.outlier_columns(words), largest)


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "int4", "--outliers", "60%"], "outliers of 60 % are not more than 0 and at most 10 %"),
        (["--format", "int4", "--outliers", "some"], "outliers 'some' are not a share"),
        (["--format", "fp16", "--outliers", "0.5%"], "float16 keeps every weight as it is: outliers stand beside"),
        (
            ["--outliers", "0.5%", "--level", "int4", "--level", "int8", "--target-bits", "6"],
            "outliers stand beside one format",
        ),
        (["--format", "int4", "--outliers", "0.5%", "--export", "humming"], "humming cannot say outliers beside codes"),
        (["--override", "down_proj=bf16", "--outliers", "0.5%"], "only repacks weights that are pruned, and"),
    ],
)
def test_what_cannot_keep_outliers_is_said_in_one_line_before_the_work(
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


def test_levels_experts_and_embeddings_keep_none(source: Path, tmp_path: Path) -> None:
    mix = Mix((get_scheme("int4"), get_scheme("int8")))
    with pytest.raises(InputError, match="outliers stand beside one format"):
        quantize(source, tmp_path / "out", outliers="1%", assignments={"x": Assignment(mix, b"\0")})
    experts = checkpoints.save("mixtral", tmp_path / "experts")
    with pytest.raises(InputError, match="experts and embeddings keep no outliers: give them an override"):
        quantize(experts, tmp_path / "out", format="int4", outliers="1%")
    quantize(experts, tmp_path / "out", format="int4", outliers="1%", overrides=["experts=int8"])
    stored = packed_models.tensors(tmp_path / "out")
    assert {name.split(".")[3] for name in stored if name.endswith("weight_outliers")} == {"self_attn"}
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(one, PackedLinear) and one.weight_outliers is not None for one in model.modules()) == 8


def test_a_checkpoint_that_lost_its_outliers_is_refused(packed: Path, tmp_path: Path) -> None:
    stored = packed_models.tensors(packed)
    del stored["model.layers.0.mlp.up_proj.weight_outliers"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    for look in (lambda: inspect(tmp_path, read_architecture), lambda: models.load(tmp_path, "cpu")):
        with pytest.raises(CheckpointError, match="weight_outliers"):
            look()
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]["outliers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TersorError):
        models.load(tmp_path, "cpu")
