"""MLP units that never fire on a text: which they are, what is said of them, and how they are dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import calibrated, checkpoints
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tersor.cli import main
from tersor.convert import prune as job

OPTIONS: dict[str, Any] = {
    "sparsity": 0.5,
    "calibration_tokens": 96,
    "calibration_window": 32,
    "algorithm": "magnitude",
}
DOWN, GATE, UP = (f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated.text(tmp_path_factory.mktemp("text") / "calibration.txt")


def dead_units(output: Path) -> dict[str, list[int]]:
    """Return what the log has of them, by layer."""
    found: dict[str, list[int]] = json.loads((output / "tersor-calibration.json").read_text())["dead_units"]
    return found


def weight(directory: Path, name: str) -> torch.Tensor:
    """Return what a layer of a pruned checkpoint multiplies by."""
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found: torch.Tensor = loaded.get_submodule(name).stored_weight().dequantize()
    return found


@pytest.fixture(scope="module")
def with_dead_units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in whose first MLP units 2 and 5 never fire."""
    directory = calibrated.model("llama", tmp_path_factory.mktemp("dead") / "model")
    for path in directory.glob("*.safetensors"):
        held = checkpoints.load(path)
        if f"{GATE}.weight" in held:
            held[f"{GATE}.weight"][[2, 5]] = 0
            save_file(held, path, {"format": "pt"})
    return directory


def test_units_that_never_fire_are_counted_and_dropped(with_dead_units: Path, text: Path, tmp_path: Path) -> None:
    for what in ("report", "drop"):
        report = job.prune(with_dead_units, tmp_path / what, calibration=text, dead_neurons=what, **OPTIONS)
        assert report.dead_units is not None
        assert report.dead_units[DOWN] == 2
        assert sum(report.dead_units.values()) == 2
        assert dead_units(tmp_path / what)[DOWN] == [2, 5]
    kept, dropped = (weight(tmp_path / what, UP) for what in ("report", "drop"))
    assert kept[[2, 5]].any()
    assert not dropped[[2, 5]].any()
    assert not weight(tmp_path / "drop", DOWN)[:, [2, 5]].any()
    assert dropped.shape == kept.shape


@pytest.mark.parametrize(
    ("kind", "maker", "reader", "parts"),
    [
        ("opt", "model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2", 1),
        ("phi3", "model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj", 2),
    ],
)
def test_units_of_other_mlps_are_found_by_the_names_of_their_layers(
    kind: str, maker: str, reader: str, parts: int, text: Path, tmp_path: Path
) -> None:
    """Without a gate, with biases, and with gate and up in one."""
    model = calibrated.model(kind, tmp_path / "model")
    for path in model.glob("*.safetensors"):
        held = checkpoints.load(path)
        held[f"{maker}.weight"][[2, 5]] = 0
        if f"{maker}.bias" in held:
            held[f"{maker}.bias"][[2, 5]] = -1
        save_file(held, path, {"format": "pt"})
    report = job.prune(model, tmp_path / "out", calibration=text, dead_neurons="drop", values="fp6", **OPTIONS)
    assert report.dead_units is not None and report.dead_units[reader] >= 2
    assert {2, 5} <= set(dead_units(tmp_path / "out")[reader])
    made, read = (weight(tmp_path / "out", name) for name in (maker, reader))
    assert not read[:, [2, 5]].any() and read.any()
    for part in range(parts):
        assert not made[[2 + part * read.shape[1], 5 + part * read.shape[1]]].any()


def test_the_command_says_what_it_stored_and_how_many_units_never_fire(
    with_dead_units: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sparsity", "0.5", "--algorithm", "wanda", "--values", "fp6", "--dead-neurons", "drop"]
    options += ["--calibration", str(text), "--calibration-tokens", "96", "--calibration-window", "32"]
    assert main.run(["prune", str(with_dead_units), "-o", str(tmp_path / "out"), *options]) == 0
    shown = capsys.readouterr().out
    assert "14 pruned weights stored sparse" in shown
    assert "2 MLP units never fire on the text and became zero" in shown
    assert main.run(["prune", str(with_dead_units), "-o", str(tmp_path / "out"), *options]) == 2
    assert "exists" in capsys.readouterr().err
