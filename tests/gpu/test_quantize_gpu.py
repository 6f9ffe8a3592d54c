"""Checkpoints encoded on a GPU: the same bytes as on a CPU, and humming's own functions read what was exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints

from tersor.convert import quantize
from tersor.convert.layers import LAYERS_NAME
from tersor.formats import Scheme

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

OPTIONS = (
    {"format": "fp6_e3m2"},
    {"format": "fp5_e2m2", "group_size": 32, "scale_dtype": "bfloat16"},
    {"format": "fp4_e2m1", "scale_dtype": "float32"},
    {"format": "int4", "group_size": 32},
    {"format": "uint4", "group_size": 32},
    {"format": "mxfp6_e2m3"},
    {"format": "fp8_e4m3"},
)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["format"])
def test_the_bytes_are_those_of_the_cpu(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    wide = {"n_embd": 512, "n_inner": 1408} if name == "gpt2" else {"hidden_size": 512, "intermediate_size": 1408}
    source = checkpoints.save(name, tmp_path / "model", **wide)
    on_gpu = quantize(source, tmp_path / "cuda", device="cuda", **options)
    on_cpu = quantize(source, tmp_path / "cpu", **options)
    cuda, cpu = (checkpoints.bytes_of(tmp_path / device) for device in ("cuda", "cpu"))
    layers = [json.loads(files.pop(LAYERS_NAME))["layers"] for files in (cuda, cpu)]
    assert cuda == cpu
    for a, b in zip(*layers, strict=True):
        assert a.pop("relative_error") == pytest.approx(b.pop("relative_error"), rel=1e-3)  # summed in another order
        assert a == b
    for a, b in zip(on_gpu.rows, on_cpu.rows, strict=True):
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "fp6_e3m2"},
        {"format": "fp6_e2m3", "group_size": 64},
        {"format": "fp5_e2m2", "group_size": 32},
        {"format": "fp4_e2m1", "group_size": 128},
        {"format": "fp7_e3m3"},
        {"format": "int3", "group_size": 32},
        {"format": "int4"},
        {"format": "int8", "group_size": 128},
        {"format": "mxfp6_e3m2"},
    ],
    ids=lambda options: options["format"],
)
def test_humming_decodes_its_export_to_our_values(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("humming")
    from humming.schema import BaseInputSchema, BaseWeightSchema

    source = checkpoints.save("llama", tmp_path / "model", hidden_size=256, intermediate_size=640)
    quantize(source, tmp_path / "humming", export="humming", **options)
    scale_dtype = {} if options["format"].startswith("mx") else {"scale_dtype": "bfloat16"}
    report = quantize(source, tmp_path / "own", **options, **scale_dtype)
    config = json.loads((tmp_path / "humming/config.json").read_text())["quantization_config"]
    own, exported = checkpoints.weights(tmp_path / "own"), checkpoints.weights(tmp_path / "humming")
    schema = BaseWeightSchema.from_config(config)
    assert BaseInputSchema.from_config(config).a_dtype is None
    for row in report.compressed:
        stem = row.name.removesuffix(".weight")
        tensors = {name: exported[f"{stem}.{name}"].cuda() for name in ("weight", "weight_scale")}
        schema.validate_tensors(tensors, *row.shape, torch.bfloat16)
        wanted = checkpoints.decode(own, stem, Scheme.from_key(row.scheme), row.shape[1])
        assert torch.equal(schema.dequant_tensors(tensors).cpu(), wanted)
