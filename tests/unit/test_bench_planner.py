"""bench/planner.py: what is measured of searches, and that it is of the problem that it says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tersor.planner import search

FOLDER = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(name="bench")
def planner_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import planner

    yield planner
    for name in {"planner", "results_file"} - before:
        sys.modules.pop(name, None)


def test_a_made_model_has_layers_that_are_equal_and_tied(bench: ModuleType) -> None:
    problem = bench.model(3, 4, 0.3)
    assert len(problem.blocks) == 3 * bench.BLOCKS + 2
    one, other = (next(block for block in problem.blocks if block.name == name) for name in ("0.4", "2.4"))
    assert one.tie == other.tie == "layer.4" and one.seconds.tolist() == other.seconds.tolist()
    found = search.fast(problem)
    assert found.gap == 0 and problem.fits(found.choice)
    assert found.seconds > search.fast(bench.model(3, 4, None)).seconds  # the limit binds


def test_a_run_writes_what_every_search_took(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import results_file

    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "LAYERS", 2)
    words = ["planner.py", "--layers", "1", "--options", "3", "--devices", "1,64", "--episodes", "3"]
    monkeypatch.setattr(sys, "argv", words)
    bench.main()
    result = json.loads((tmp_path / "planner.json").read_text(encoding="utf-8"))
    assert set(result["layers"]) == {"1 free", "1 binding"} and set(result["devices"]) == {"1", "64"}
    tied = result["layers"]["1 binding"]
    assert tied["fast, tied"]["gap"] == 0 and tied["full, untied"]["gap"] <= 1e-3
    assert tied["full, untied"]["ms"] == pytest.approx(tied["fast, untied"]["ms"], rel=1e-3)
    assert result["learned"]["1 free"]["random"]["gap"] is None
    assert result["devices"]["64"]["stages"]["stages"] >= 1
    assert "HiGHS alone, untied" in capsys.readouterr().out
