"""The humming export, read by humming's own schema: its shapes and dtypes, and the values that it decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints

from tersor.convert import quantize
from tersor.formats import Scheme

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "options",
    [
        {"format": "fp6_e3m2"},
        {"format": "fp6_e2m3", "group_size": 16},
        {"format": "fp5_e2m2", "group_size": 32},
        {"format": "int4", "group_size": 32},
        {"format": "int3"},
        {"format": "int8"},
        {"format": "mxfp4_e2m1"},
        {"format": "mxfp6_e3m2"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_humming_reads_the_same_values(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    """qwen2 has biases, which stay beside the weights."""
    pytest.importorskip("humming")
    from humming.schema import BaseWeightSchema

    source = checkpoints.save(model, tmp_path / "model", intermediate_size=160)
    quantize(source, tmp_path / "export", export="humming", **options)
    scale_dtype = None if options["format"].startswith("mx") else "bfloat16"
    report = quantize(source, tmp_path / "own", scale_dtype=scale_dtype, **options)
    own, tensors = checkpoints.weights(tmp_path / "own"), checkpoints.weights(tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())["quantization_config"]
    schema = BaseWeightSchema.from_config(config)
    for row in report.compressed:
        stem = row.name.removesuffix(".weight")
        oc, ic = row.shape
        local = {}
        for name, wanted in schema.get_tensors_attrs(oc, ic, torch.bfloat16).items():
            stored = tensors[f"{stem}.{name}"]
            assert (tuple(stored.shape), stored.dtype) == (tuple(wanted["shape"]), wanted["dtype"]), (stem, name)
            local[name] = stored.cuda()
        decoded = checkpoints.decode(own, stem, Scheme.from_key(row.scheme), ic)
        assert torch.equal(schema.dequant_tensors(local).float().cpu(), decoded), stem
