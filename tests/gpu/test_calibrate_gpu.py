"""Calibration on a GPU: layers are nearer to the original than round to nearest, and a resume has the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, checkpoints, interrupted

from tersor.convert import quantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SIZES = {"hidden_size": 128, "intermediate_size": 256}
OPTIONS: dict[str, Any] = {**calibrated.OPTIONS, "group_size": 64, "device": "cuda"}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("effort", ["normal", "high"])
def test_every_layer_gets_nearer_and_a_resume_has_the_same_bytes(tmp_path: Path, name: str, effort: str) -> None:
    model = calibrated.model(name, tmp_path / "model", **SIZES)
    text = calibrated.text(tmp_path / "text.txt")
    quantize(model, tmp_path / "whole", calibration=text, effort=effort, **OPTIONS)
    log = json.loads((tmp_path / "whole" / "tersor-calibration.json").read_text())
    assert all(line["objective_after"] <= line["objective_before"] for line in log["layers"])

    progress = interrupted.at_call(2 if effort == "normal" else 5)
    with pytest.raises(interrupted.Stopped):
        quantize(model, tmp_path / "out", calibration=text, effort=effort, progress=progress, **OPTIONS)
    quantize(model, tmp_path / "out", calibration=text, effort=effort, resume=True, **OPTIONS)
    whole, again = (checkpoints.bytes_of(tmp_path / folder) for folder in ("whole", "out"))
    for files in (whole, again):
        files.pop("tersor-calibration.json")
    assert again == whole
