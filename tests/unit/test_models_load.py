"""Checkpoints become decoders: which tensors they need, how they are read, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints, decoders, packed_models, tiny_lm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tersor import models
from tersor.checkpoint.header import TensorSpec
from tersor.checkpoint.reader import SafetensorsFile
from tersor.checkpoint.source import StoredTensor, open_source
from tersor.errors import CheckpointError, TersorError, UnsupportedError
from tersor.formats import Activations
from tersor.layouts import PackedWeight
from tersor.layouts.shard import Part
from tersor.models import reading
from tersor.models.weights import Product

LONG = {"max_position_embeddings": 256}


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Edit the tensors of a checkpoint in one file."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def configure(path: Path, **changes: Any) -> Path:
    """Edit the config.json of a checkpoint."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = change(tiny_lm.copy(tmp_path / "m"), lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks tensor 'model.layers.2.mlp.up_proj.weight' of the model"):
        models.load(path, "cpu")


def test_a_tensor_that_is_left_over_is_named(tmp_path: Path) -> None:
    path = change(
        tiny_lm.copy(tmp_path / "m"), lambda all_: all_.update({"model.layers.0.mlp.up_proj.bias": torch.ones(3)})
    )
    with pytest.raises(CheckpointError, match=r"holds tensor 'model.layers.0.mlp.up_proj.bias', which the model"):
        models.load(path, "cpu")


def test_tensors_under_other_names_are_named_on_both_sides(tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.input_norm.weight"] = tensors.pop("model.layers.1.input_layernorm.weight")

    path = change(tiny_lm.copy(tmp_path / "m"), rename)
    with pytest.raises(CheckpointError, match=r"1.input_layernorm.weight' of .* it holds 'model.layers.1.input_norm"):
        models.load(path, "cpu")


def test_a_tensor_of_another_shape_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = configure(tiny_lm.copy(tmp_path / "m"), intermediate_size=641)
    monkeypatch.setattr(SafetensorsFile, "read_into", None)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight' is BF16 \[640, 256\], .* has floats \[641, 256\]"):
        models.load(path, "cpu")


def test_layers_beyond_those_of_the_config_are_left_over(tmp_path: Path) -> None:
    path = configure(tiny_lm.copy(tmp_path / "m"), num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"holds tensor 'model.layers.3.* and 8 more tensors, which the model"):
        models.load(path, "cpu")


def test_what_other_programs_left_there_is_ignored(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    path = change(tiny_lm.copy(tmp_path / "m"), add)
    assert decoders.difference(models.load(path, "cpu"), tiny_lm.model()) < 1e-4


def test_weights_of_another_method_are_refused(tmp_path: Path) -> None:
    path = configure(tiny_lm.copy(tmp_path / "m"), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        UnsupportedError,
        match="m: the engine does not load weights compressed by gptq: convert",
    ):
        models.load(path, "cpu")


def test_packed_tensors_that_the_config_leaves_alone_are_refused(tmp_path: Path) -> None:
    path = packed_models.compressed(tiny_lm.TINY, tmp_path / "packed")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    configure(path, quantization_config={**config, "ignore": ["down_proj"]})
    with pytest.raises(CheckpointError, match=r"mlp.down_proj.weight_packed is packed, and quantization_config leaves"):
        models.load(path, "cpu")


def test_packed_tensors_of_another_scheme_are_refused(tmp_path: Path) -> None:
    path = packed_models.compressed(tiny_lm.TINY, tmp_path / "packed")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    configure(path, quantization_config={**config, "format": "int4"})
    with pytest.raises(CheckpointError, match=r"weight_packed' is I32 \[256, 48\], and .* has I32 \[256, 32\]"):
        models.load(path, "cpu")


def test_a_checkpoint_in_several_files_is_one(tmp_path: Path) -> None:
    path = checkpoints.save("qwen3_moe", tmp_path / "m", torch.float32, max_shard_size="60KB", **LONG)
    assert len(list(path.glob("*.safetensors"))) > 1
    reference = AutoModelForCausalLM.from_pretrained(path).eval()
    assert decoders.difference(models.load(path, "cpu"), reference) < 1e-4


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_model_saved_without_its_head_is_read_where_the_head_is_tied(name: str, tmp_path: Path) -> None:
    path = packed_models.plain(name, tmp_path / "m", tie_word_embeddings=True, **LONG)
    reference = AutoModelForCausalLM.from_pretrained(path).eval()

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    change(path, shorten)
    assert decoders.difference(models.load(path, "cpu"), reference) < 1e-4


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("gpt_oss", {"format": "fp6_e3m2"}), ("mixtral", {"format": "uint4", "group_size": 32})],
)
def test_every_byte_is_read_once(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed_models.plain(name, tmp_path / "plain")
    if options:
        path = packed_models.compressed(path, tmp_path / "packed", **options)
    reads: list[tuple[str, int]] = []
    read = SafetensorsFile.read_into

    def counted(self: SafetensorsFile, spec: TensorSpec, start: int, buffer: memoryview) -> None:
        reads.append((spec.name, len(buffer)))
        read(self, spec, start, buffer)

    monkeypatch.setattr(SafetensorsFile, "read_into", counted)
    models.load(path, "cpu")
    stored = packed_models.tensors(path)
    assert sum(nbytes for _, nbytes in reads) == sum(tensor.nbytes for tensor in stored.values())
    packed_stacks = {key: tensor for key, tensor in stored.items() if key.endswith("experts.down_proj.weight_packed")}
    assert len(packed_stacks) == (2 if name == "gpt_oss" else 0)
    for key, tensor in packed_stacks.items():  # an expert after the other
        assert [nbytes for read_name, nbytes in reads if read_name == key] == [tensor.nbytes // 4] * 4


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.04), (torch.float16, 0.006)])
def test_16_bit_decoders_are_as_exact_as_their_dtype(dtype: torch.dtype, most: float) -> None:
    decoder = models.load(tiny_lm.TINY, "cpu", dtype)
    assert decoder.dtype is dtype
    assert {tensor.dtype for tensor in decoder.tensors()} == {dtype}
    assert decoders.difference(decoder, tiny_lm.model()) < most


@pytest.mark.parametrize("rows", [None, (3, 8)])
def test_large_tensors_are_read_in_chunks(
    rows: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK", 1000)
    weight = torch.randn(9, 3, 77)
    save_file({"w": weight, "none": torch.empty(0, 3)}, tmp_path / "m.safetensors")
    with SafetensorsFile(tmp_path / "m.safetensors") as file, reading.Reading(torch.device("cpu")) as reader:
        first, last = rows or (0, 9)
        assert torch.equal(reader.read(StoredTensor(file, file.tensors["w"]), rows), weight[first:last])
        assert reader.read(StoredTensor(file, file.tensors["none"])).shape == (0, 3)


def test_parts_of_tensors_and_of_experts_in_them_are_read_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK", 100)
    weights = {"one": torch.randn(9, 77), "all": torch.randn(3, 9, 77), "bias": torch.randn(9)}
    save_file(weights, tmp_path / "m.safetensors")
    part = Part(((1, 4), (6, 9)), (5, 30))
    chosen = torch.tensor([1, 2, 3, 6, 7, 8])
    with SafetensorsFile(tmp_path / "m.safetensors") as file, reading.Reading(torch.device("cpu")) as reader:
        one, many, bias = (StoredTensor(file, file.tensors[name]) for name in weights)
        assert torch.equal(reader.read_part(one, part), weights["one"][chosen, 5:30])
        assert torch.equal(reader.read_part(many, part, 2), weights["all"][2][chosen, 5:30])
        assert torch.equal(reader.read_part(bias, Part(part.rows)), weights["bias"][chosen])


def test_what_a_disk_does_not_give_is_said_from_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "CHUNK", 1000)
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.randn(9, 3, 77)}, path)
    with SafetensorsFile(path) as file, reading.Reading(torch.device("cpu")) as reader:
        os.truncate(path, file.nbytes - 5)
        with pytest.raises(CheckpointError, match="ends inside tensor 'w'"):
            reader.read(StoredTensor(file, file.tensors["w"]))


def test_a_context_is_what_is_asked_for_up_to_that_of_the_model_in_whole_pages() -> None:
    for asked, rows in ((None, 2048), (100, 128), (5000, 2048)):
        rotary = models.load(tiny_lm.TINY, "cpu", context=asked).layers[0].attention.rotary
        assert rotary is not None and rotary.shape == (rows, 64)


def test_layers_of_one_rotation_share_its_table(tmp_path: Path) -> None:
    path = checkpoints.save("gemma3_text", tmp_path / "m", num_hidden_layers=7)
    tables = [layer.attention.rotary for layer in models.load(path, "cpu").layers]
    assert len({id(table) for table in tables}) == 2


def test_an_open_checkpoint_stays_open() -> None:
    with open_source(tiny_lm.TINY) as source:
        models.load(source, "cpu")
        assert source.files[0].read("model.norm.weight").shape == (256,)


def test_activations_in_8_bits_lay_weights_out_for_them(tmp_path: Path) -> None:
    path = packed_models.compressed(tiny_lm.TINY, tmp_path / "packed")
    decoder = models.load(path, "cpu", activations="fp8")
    out = decoder.layers[0].attention.out
    assert isinstance(out, Product) and isinstance(out.weight, PackedWeight)
    assert out.weight.layout == "tiles_float8_e4m3fn"
    assert Activations.of("fp8") is Activations.E4M3
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert 1e-4 < decoders.difference(decoder, reference) < 0.1


def test_a_decoder_that_does_not_fit_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SafetensorsFile, "read_into", full)
    with pytest.raises(TersorError, match="tiny-lm: the weights do not fit in the memory of cpu"):
        models.load(tiny_lm.TINY, "cpu")


def test_loading_and_running_need_no_transformers() -> None:
    program = f"""
import sys, torch
from tersor import models
from tersor.ops import Rows
decoder = models.load({str(tiny_lm.TINY)!r}, "cpu")
one = torch.tensor([0, 1], dtype=torch.int32)
rows = Rows(one, one[1:], one[1:, None], 1, 64)
assert decoder(torch.tensor([5]), rows, decoder.caches(2), torch.tensor([0])).shape == (1, 8192)
print(sorted({{"transformers", "safetensors", "huggingface_hub", "tokenizers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
