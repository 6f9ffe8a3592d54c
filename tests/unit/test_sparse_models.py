"""Pruned checkpoints: recognised, repacked, listed, loaded through transformers and run by the engine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints, decoders, interrupted, packed_models, pruned
from helpers.ranks import together
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tersor import models
from tersor.checkpoint.inspect import inspect
from tersor.checkpoint.source import open_source
from tersor.cli.main import app
from tersor.compress import encode
from tersor.convert import quantize, survey
from tersor.errors import CheckpointError, InputError, UnsupportedError
from tersor.formats import get_scheme
from tersor.hardware import CHIPS
from tersor.integrations.transformers.architecture import read_architecture
from tersor.integrations.transformers.replace import multiply_with, unpack_model
from tersor.layouts import SparseWeight, TiledSparseWeight
from tersor.models.kernels import Steps, kernels_of
from tersor.models.load import described
from tersor.models.outline import outline
from tersor.models.weights import FeedForward, GatedProduct, Product, Products
from tersor.nn import PackedLinear, SparseLinear
from tersor.ops import warm
from tersor.ops.collective import Ranks

LONG = {"max_position_embeddings": 256}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which half is pruned."""
    return pruned.saved("llama", tmp_path_factory.mktemp("llama") / "model", **LONG)


@pytest.fixture(scope="module", params=["bf16", "fp6"])
def packed(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It repacked without loss, and in six bits."""
    output = tmp_path_factory.mktemp("packed") / str(request.param)
    quantize(source, output, format=request.param)
    return output


def test_what_was_pruned_is_repacked_without_loss(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "out", format="bf16")
    rows = [row for row in report.rows if row.scheme is not None]
    assert {row.scheme for row in rows} == {"sparse:bfloat16"} and {row.relative_error for row in rows} == {0.0}
    plain, stored = checkpoints.weights(source), packed_models.tensors(tmp_path / "out")
    layers = json.loads((tmp_path / "out" / "tersor-layers.json").read_text())["layers"]
    assert [line["density"] for line in layers] == [row.density for row in rows]
    for row in rows:
        stem = row.name.removesuffix(".weight")
        weight = SparseWeight.from_stored(
            SparseWeight.from_plain(plain[row.name]).sparse,
            (row.shape[0], row.shape[1]),
            stored[f"{stem}.weight_mask"],
            stored[f"{stem}.weight_values"],
        )
        assert torch.equal(
            weight.dequantize(torch.bfloat16).view(torch.int16), (plain[row.name] + 0.0).view(torch.int16)
        )
        assert row.density == pytest.approx(0.5, abs=0.05)
        assert row.bytes_after == weight.mask.nbytes + weight.values.nbytes
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (said["version"], said["format"], said["sparse"]) == (3, "bfloat16", True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Linear weights are bfloat16 numbers, repacked without loss" in card
    assert re.search(r"14 pruned weights are stored sparse: (49|50)\.\d % of their elements are left", card)


def test_every_weight_is_stored_as_takes_fewest_bytes(tmp_path: Path) -> None:
    source = pruned.saved("llama", tmp_path / "model", lambda name: 0.5 if "down_proj" in name else 0.97, **LONG)
    quantize(source, tmp_path / "off", sparse="off")
    report = quantize(source, tmp_path / "out")
    stored = packed_models.tensors(tmp_path / "out")
    sparse = {name.rsplit(".", 1)[0] for name in stored if name.endswith(".weight_mask")}
    assert sparse == {row.name.removesuffix(".weight") for row in report.rows if "down_proj" in row.name}
    dense = packed_models.tensors(tmp_path / "off")
    assert all(torch.equal(stored[name], dense[name]) for name in stored if name.rsplit(".", 1)[0] not in sparse)
    assert not any(name.endswith(".weight_mask") for name in dense)
    assert json.loads((tmp_path / "off" / "config.json").read_text())["quantization_config"]["version"] == 1
    plain = quantize(source, tmp_path / "plain", format="bf16")
    kept = {row.note for row in plain.rows if row.linear and row.scheme is None}
    assert kept == {"not pruned so far that it would be smaller", "output head"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules() if "proj" in name}
    assert kinds["down_proj"] is SparseLinear and kinds["up_proj"] is PackedLinear
    decoder = models.load(tmp_path / "plain", "cpu", dtype=torch.float32)
    wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert decoders.difference(decoder, wanted) < 1e-4


def test_codes_of_what_is_left_are_those_of_the_dense_weight(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", format="int4", group_size=32)
    name = "model.layers.0.mlp.down_proj"
    weight, stored = checkpoints.weights(source)[f"{name}.weight"], packed_models.tensors(tmp_path / "out")
    encoded = encode(weight, get_scheme("int4", 32))
    wanted = SparseWeight.from_encoded(encoded, weight != 0)
    assert torch.equal(stored[f"{name}.weight_values"], wanted.values)
    assert torch.equal(stored[f"{name}.weight_scale"], encoded.scale)


def test_a_model_loads_runs_and_is_saved_as_it_was(packed: Path, source: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    assert all(isinstance(layer.mlp.up_proj, SparseLinear) for layer in model.model.layers)
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(source).num_parameters()
    with pytest.raises(UnsupportedError, match="16-bit activations alone"):
        multiply_with(model, "int8")
    tokens = torch.arange(2, 30)[None]
    found = model(tokens).logits.detach()
    model.save_pretrained(tmp_path / "saved")
    before, after = packed_models.tensors(packed), packed_models.tensors(tmp_path / "saved")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    unpack_model(model, torch.float32)
    torch.testing.assert_close(model(tokens).logits, found, rtol=1e-4, atol=1e-4)
    if packed.name == "bf16":
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        torch.testing.assert_close(plain(tokens).logits, found, rtol=1e-4, atol=1e-4)


def test_activations_in_e4m3_meet_values_that_e4m3_has(packed: Path) -> None:
    """In transformers and in the engine alike; others are refused when the model is loaded."""
    model: Any = AutoModelForCausalLM.from_pretrained(packed, attn_implementation="eager", dtype=torch.float32).eval()
    if packed.name == "bf16":
        for load in (
            lambda: multiply_with(model, "fp8"),
            lambda: models.load(packed, "cpu", activations="fp8"),
        ):
            with pytest.raises(UnsupportedError, match="alone: plain values meet activations as they come"):
                load()
        return
    tokens = torch.arange(2, 30)[None]
    exact = model(tokens).logits.detach()
    multiply_with(model, "fp8")
    decoder = models.load(packed, "cpu", dtype=torch.float32, activations="fp8")
    assert isinstance(decoder.layers[0].attention.out, Product)
    held = decoder.layers[0].attention.out.weight
    assert isinstance(held, TiledSparseWeight) and held.packing.bytewise
    found = model(tokens).logits.detach()
    assert 0.0 < float((found - exact).abs().max()) < 0.3 * float(exact.abs().max())
    assert decoders.difference(decoder, model) < 0.1 * float(exact.abs().max())


def decoded(path: Path) -> Any:
    """Return transformers' model of a packed one, decoded."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
    unpack_model(model, torch.float32)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "opt"])
def test_the_engine_gives_the_logits_of_the_decoded_weights(kind: str, tmp_path: Path) -> None:
    source = pruned.saved(kind, tmp_path / "model", 0.4, torch.float32, **LONG)
    quantize(source, tmp_path / "out", format="uint4", group_size=32)
    decoder = models.load(tmp_path / "out", "cpu")
    assert decoders.difference(decoder, decoded(tmp_path / "out")) < 1e-4
    qkv, ffn = decoder.layers[0].attention.reader, decoder.layers[0].ffn
    assert isinstance(qkv, Product) and isinstance(qkv.weight, SparseWeight)
    assert isinstance(ffn, FeedForward) and isinstance(ffn.down.weight, SparseWeight)
    if kind != "opt":
        assert isinstance(ffn.up, GatedProduct) and isinstance(ffn.up.weight, SparseWeight)


def test_the_kernels_of_an_engine_are_known_beside_pruned_weights(tmp_path: Path) -> None:
    source = pruned.saved("llama", tmp_path / "model", lambda name: 0.5 if "layers.1" in name else 1.0, **LONG)
    quantize(source, tmp_path / "out", format="fp6")
    decoder = models.load(tmp_path / "out", "cpu", dtype=torch.bfloat16)
    steps = Steps(tokens=8, rows=8, queries=8, length=64)
    asked = {source.name for source in kernels_of(decoder, steps, CHIPS["NVIDIA H200"])}
    with open_source(tmp_path / "out") as opened:
        config, names, _, forms = described(opened)
    parts = outline(config, names, forms, torch.bfloat16)
    assert {source.name for source in kernels_of(parts, steps, CHIPS["NVIDIA H200"])} >= asked
    assert sum(isinstance(layer.ffn.down.weight, SparseWeight) for layer in parts.layers) == 1
    assert any("tersor_sparse_sm90_" in name and name.endswith("_gated") for name in asked)
    with open_source(tmp_path / "out") as opened:
        linears = {source.name for source in warm.pruned_sources(opened, ["bfloat16"], CHIPS["NVIDIA H200"])}
        older = {source.name for source in warm.pruned_sources(opened, ["bfloat16"], CHIPS["NVIDIA A100"])}
    assert older == {"tersor_decode_stored_fp6_e2m3_bfloat16", "tersor_epilogue_bfloat16"}
    assert linears and all("tersor_sparse_sm90_" in name and "bfloat16" in name for name in linears)


def test_queries_stored_dense_beside_pruned_keys_are_products_of_their_own(tmp_path: Path) -> None:
    source = pruned.saved("llama", tmp_path / "model", lambda name: 1.0 if "q_proj" in name else 0.3, **LONG)
    quantize(source, tmp_path / "out")
    decoder = models.load(tmp_path / "out", "cpu", dtype=torch.float32)
    assert isinstance(decoder.layers[0].attention.reader, Products)
    assert decoders.difference(decoder, decoded(tmp_path / "out")) < 1e-4


@pytest.mark.parametrize("format", ["bf16", "fp6"])
def test_ranks_have_parts_of_masks_and_values(format: str, tmp_path: Path) -> None:
    source = pruned.saved("qwen2", tmp_path / "model", 0.5, intermediate_size=160, **LONG)
    quantize(source, tmp_path / "out", format=format)
    text = decoders.texts(96)[1]
    wanted = decoders.whole(models.load(tmp_path / "out", "cpu", dtype=torch.float32), text)

    def run(ranks: Ranks) -> torch.Tensor:
        return decoders.whole(models.load(tmp_path / "out", "cpu", ranks=ranks, dtype=torch.float32), text)

    for found in together(2, run):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_transposed_layers_are_counted_by_output_features(tmp_path: Path) -> None:
    source = pruned.saved("gpt2", tmp_path / "model", 0.3)
    quantize(source, tmp_path / "out", format="bf16")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.arange(2, 30)[None]
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, SparseLinear) and module.transposed for module in model.modules())


def test_small_blocks_and_an_interruption_give_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"format": "fp5", "shard_size": 12_000}
    quantize(source, tmp_path / "whole", **options)
    monkeypatch.setattr("tersor.convert.pipeline._CPU_BLOCK_ELEMENTS", 500)
    monkeypatch.setattr(survey, "_BLOCK_BYTES", 1000)

    with pytest.raises(interrupted.Stopped):
        quantize(source, tmp_path / "out", **options, progress=interrupted.after(0.5))
    assert (tmp_path / "out.partial").is_dir()
    quantize(source, tmp_path / "out", **options, resume=True)
    assert checkpoints.bytes_of(tmp_path / "out") == checkpoints.bytes_of(tmp_path / "whole")


def test_inspect_shows_what_is_left_bits_and_the_choice(tmp_path: Path) -> None:
    source = pruned.saved("llama", tmp_path / "model", lambda name: 0.25 if "mlp" in name else 1.0)
    quantize(source, tmp_path / "out")
    found = {item.name: item for item in inspect(tmp_path / "out", read_architecture).items}
    up, query = found["model.layers.0.mlp.up_proj.weight"], found["model.layers.0.self_attn.q_proj.weight"]
    left = float((checkpoints.weights(source)[up.name] != 0).double().mean())
    assert (up.format, up.density, query.density) == ("sparse:fp6_e2m3:row:float16", left, None)
    stored = packed_models.tensors(tmp_path / "out")
    nbytes = sum(one.nbytes for name, one in stored.items() if name.startswith("model.layers.0.mlp.up_proj."))
    assert up.nbytes == nbytes and up.bits_per_weight == 8 * nbytes / up.numel
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).output
    assert "sparse, fp6_e2m3, row, float16" in shown and " left" in shown and "25." in shown
    dry = CliRunner().invoke(app, ["quantize", str(source), "--dry-run"]).output
    assert "pruned weights stored sparse, of whose elements" in dry


def test_inspect_counts_zeros_of_weights_that_are_stored_dense_where_it_is_asked_to(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a checkpoint that somebody pruned, of codes with scales in groups and with zero points, and of no others."""
    monkeypatch.setattr("tersor.checkpoint.zeros._BLOCK_ELEMENTS", 700)
    quantize(source, tmp_path / "out", format="int4", group_size=32, overrides={"down_proj": "uint4"}, sparse="off")
    quantize(source, tmp_path / "lut3", format="lut3")
    plain, packed, tables = (inspect(path, read_architecture, zeros=True).items for path in
                             (source, tmp_path / "out", tmp_path / "lut3"))  # fmt: skip
    given = checkpoints.weights(source)
    for item in plain:
        assert item.density == (float((given[item.name] != 0).double().mean()) if len(item.shape) == 2 else None)
    found = {item.name: item for item in packed if item.compressed}
    assert {item.format for item in found.values()} == {"int4:g32:float16", "uint4:g32:float16"}
    for name, item in found.items():
        scheme = get_scheme("uint4" if "down_proj" in name else "int4", 32)
        decoded = encode(given[name], scheme).dequantize()
        assert item.density == float((decoded != 0).double().mean()) < 0.51
    assert {item.density for item in tables if item.compressed} == {None}
    assert all(item.density is None for item in inspect(source, read_architecture).items)
    shown = CliRunner().invoke(app, ["inspect", str(source), "--zeros"]).output
    assert " left" in shown and "50." in shown


def test_what_cannot_be_stored_sparse_is_said_in_a_line(source: Path, tmp_path: Path) -> None:
    dense = packed_models.plain("llama", tmp_path / "dense", torch.bfloat16)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (source, {"format": "fp16"}, "is BF16, and what is left of it keeps its bits: ask for bfloat16, not float16"),
        (
            source,
            {"format": "bf16", "sparse": "off"},
            "bfloat16 only repacks weights that are pruned, and sparse is off",
        ),
        (source, {"format": "bf16", "export": "humming"}, "exports store none: ask for a format"),
        (source, {"format": "bf16", "group_size": 32}, "bfloat16 numbers have no scales"),
        (source, {"sparse": "on"}, "sparse is 'on': use auto or off"),
        (source, {"overrides": ["up_proj=bf16"], "sparse": "off"}, "bfloat16 only repacks weights that are pruned"),
        (dense, {"format": "bf16"}, "no linear layer is left to compress .14 not pruned so far"),
    ]
    for model, options, words in cases:
        with pytest.raises(InputError, match=words):
            quantize(model, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="bfloat16 is what pruned weights keep, which are looked for in checkpoints"):
        quantize(AutoModelForCausalLM.from_pretrained(dense), overrides={"up_proj": "bf16"})
    quantize(source, tmp_path / "humming", format="int4", export="humming")
    assert not any(name.endswith(".weight_mask") for name in packed_models.tensors(tmp_path / "humming"))


def test_overrides_have_values_of_their_own(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", overrides={"down_proj": "int4:g32", "up_proj": "bf16"})
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["overrides"]["up_proj"] == {"format": "bfloat16", "sparse": True}
    formats = {item.name: item.format for item in inspect(tmp_path / "out", read_architecture).items}
    assert formats["model.layers.0.mlp.up_proj.weight"] == "sparse:bfloat16"
    assert formats["model.layers.0.mlp.down_proj.weight"] == "sparse:int4:g32:float16"
    assert (
        decoders.difference(models.load(tmp_path / "out", "cpu", dtype=torch.float32), decoded(tmp_path / "out")) < 1e-4
    )


def test_tensors_that_contradict_each_other_are_refused(packed: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    given = packed_models.tensors(packed)
    changes: list[tuple[dict[str, torch.Tensor], str]] = [
        ({f"{name}.weight_values": given[f"{name}.weight_values"][:-1]}, "weights that the mask beside it leaves take"),
        ({f"{name}.weight_mask": given[f"{name}.weight_mask"][:-1]}, "mask beside it leaves take|has a mask of"),
        ({f"{name}.weight_mask": given[f"{name}.weight_mask"].int()}, "is I32 .* expected U8"),
    ]
    for index, (change, words) in enumerate(changes):
        broken = tmp_path / f"{index}"
        shutil.copytree(packed, broken)
        save_file({**given, **change}, broken / "model.safetensors", {"format": "pt"})
        for load in (
            lambda broken=broken: models.load(broken, "cpu"),
            lambda broken=broken: AutoModelForCausalLM.from_pretrained(broken),
            lambda broken=broken: inspect(broken, read_architecture),
        ):
            with pytest.raises(CheckpointError, match=words):
                load()
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"].update(sparse=False, format="fp6", version=1)
    (tmp_path / "0" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="weight_mask is of a sparse weight, and quantization_config says fp6_e2m3"
    ):
        models.load(tmp_path / "0", "cpu")
