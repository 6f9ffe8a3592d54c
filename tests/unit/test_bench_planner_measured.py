"""bench/planner_measured.py: ways to deal out all GPUs are timed under torchrun, and held against predictions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tersor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(name="bench")
def measured_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import planner_measured

    yield planner_measured
    for name in {"planner_measured", "results_file"} - before:
        sys.modules.pop(name, None)


def row(bench: ModuleType, **values: Any) -> Any:
    """A configuration of two GPUs that exchanges ten times, but for what is said."""
    usual = {
        "model": "a", "format": "fp6", "tensor": 2, "pipeline": 1, "copies": 1, "rows": 8, "context": 512,
        "predicted": 1.0, "exchanges": 10, "measured": 1.5,
    }  # fmt: skip
    return bench.Row(**{**usual, **values})


def test_every_way_uses_all_gpus(bench: ModuleType) -> None:
    assert bench.ways(2) == [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
    assert bench.ways(4) == [(4, 1, 1), (2, 2, 1), (1, 4, 1), (1, 1, 4)]
    assert (row(bench).batch, row(bench, tensor=1, pipeline=2).batch, row(bench, tensor=1, copies=2).batch) == (8, 4, 4)


def test_what_exchanges_take_is_fitted_to_half_and_corrects_the_other_half(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(bench, rows=count, measured=1.0 + count / 20, exchanges=count) for count in (2, 4, 8, 16)]
    alone = row(bench, tensor=1, copies=2, exchanges=0, measured=1.1)
    staged = [row(bench, rows=count, tensor=1, pipeline=2, exchanges=1, measured=2.2) for count in (2, 4)]
    found = bench.summary([*rows, *staged, alone])
    assert (found["us_a_sum"], found["us_a_step_handed_on"]) == (pytest.approx(50), pytest.approx(600))
    assert [one.fitted for one in [*rows, *staged]] == [True, False] * 3 and not alone.fitted
    assert [one.corrected for one in [*rows, *staged]] == pytest.approx([one.measured for one in [*rows, *staged]])
    assert alone.corrected == alone.predicted
    assert found["corrected"]["mean_error_held_out"] == pytest.approx((1 - 1 / 1.1) / 4)
    assert found["predicted"]["largest_error"] == pytest.approx(1 - 1 / 2.2)
    assert (found["configurations"], found["held_out"]) == (7, 4)
    path, other = tmp_path / "measured.json", tmp_path / "again.json"
    path.write_text(json.dumps({"rows": [asdict(one) for one in (*rows, *staged, alone)]}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["planner_measured.py", "--from", str(path), "-o", str(other)])
    bench.main()
    assert "a step that is handed on +600 us" in capsys.readouterr().out
    assert json.loads(other.read_text(encoding="utf-8"))["summary"] == found


def test_regret_is_how_much_longer_the_chosen_way_takes(bench: ModuleType) -> None:
    rows = [
        row(bench, predicted=1.0, measured=3.0, exchanges=0),
        row(bench, predicted=1.2, measured=2.0, exchanges=0, tensor=1, copies=2),
        row(bench, rows=16, predicted=1.0, measured=2.0, exchanges=0),
        row(bench, rows=16, predicted=1.2, measured=4.0, exchanges=0, tensor=1, copies=2),
        row(bench, context=2048),
    ]
    found = bench.summary(rows)["predicted"]
    assert found["choices"] == 2 and found["largest_regret"] == 0.5 and found["mean_regret"] == 0.25


def test_what_fits_nowhere_is_said_and_left_out(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    from tersor.hardware import chip_named
    from tersor.models.geometries import GEOMETRIES
    from tersor.planner import links

    chip = chip_named("h200")
    prices = chip, bench.torch.float16, links.of_chip(chip)
    found = list(bench.planned("llama-2-70b", "16bit", GEOMETRIES["llama-2-70b"], 2, [64], [2048], prices))
    assert [(one.tensor, one.pipeline, one.copies) for one, _ in found] == [(2, 1, 1), (1, 2, 1)]
    assert "not measured: DP1 PP1 TP1 cannot hold llama-2-70b" in capsys.readouterr().out
    for one, placement in found:
        assert placement.ranks == 2 and one.predicted > 15 and one.exchanges == (162 if one.tensor == 2 else 1)


def test_two_processes_run_all_of_it(bench: ModuleType, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(tersor.__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "measured.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["bench/planner_measured.py", "--device", "cpu", "--rows", "2", "--contexts", "64", "--steps", "1"]
    before = [asdict(row(bench)), asdict(row(bench, model="tiny-lm", format="16bit"))]
    out.write_text(json.dumps({"rows": before}), encoding="utf-8")
    done = subprocess.run(
        [*command, *words, "--model", "examples/tiny-lm:16bit", "--add", "-o", str(out)],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "predicted: mean error" in done.stdout and f"written to {out}" in done.stdout
    found = json.loads(out.read_text(encoding="utf-8"))
    assert (found["kind"], found["ranks"], found["summary"]["configurations"]) == ("planner measured", 2, 4)
    assert found["rows"][0]["model"] == "a", "what was there of another model is kept"
    ways = [(one["tensor"], one["pipeline"], one["copies"]) for one in found["rows"][1:]]
    assert ways == [(2, 1, 1), (1, 2, 1), (1, 1, 2)]
    assert all(one["measured"] > 0 for one in found["rows"])


def test_ranks_that_nobody_started_are_one_line(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["planner_measured.py"])
    with pytest.raises(SystemExit, match="start all ranks: torchrun --nproc-per-node 2"):
        bench.main()
