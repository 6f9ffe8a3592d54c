"""bench/planner_baselines.py: the table of docs/planning.md is that of its result, which is of the costs of today."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(name="bench")
def baselines_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import planner_baselines

    yield planner_baselines
    for name in {"planner_baselines", "results_file"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def result(bench: ModuleType) -> dict[str, Any]:
    """What the file holds."""
    found: dict[str, Any] = json.loads((FOLDER / "results" / f"{bench.NAME}.json").read_text(encoding="utf-8"))
    return found


def test_the_table_of_the_page_is_that_of_the_result(bench: ModuleType, result: dict[str, Any]) -> None:
    text = bench.PAGE.read_text(encoding="utf-8")
    assert bench.page(text, result) == text, "make it again: python bench/planner_baselines.py --write"
    assert bench.table(result) in text
    changed = json.loads(json.dumps(result))
    changed["rows"][0]["plans"]["redco"]["ms"] *= 2
    assert bench.page(text, changed) != text


def test_the_result_has_every_model_on_every_number_of_gpus(bench: ModuleType, result: dict[str, Any]) -> None:
    wanted = [(*model, devices) for model in bench.MODELS for devices in bench.DEVICES]
    assert [(one["model"], one["format"], one["devices"]) for one in result["rows"]] == wanted
    for one in result["rows"]:
        assert set(one["plans"]) == {*bench.SEARCHES, bench.ENGINE, *bench.RULES}
        best = one["plans"]["full"]["ms"]
        assert all(plan["ms"] is None or plan["ms"] >= best * (1 - 1e-6) for plan in one["plans"].values())
        assert one["plans"]["fast"]["ms"] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("index", [0, 5, 10])
def test_the_result_is_that_of_the_costs_that_are_there(bench: ModuleType, result: dict[str, Any], index: int) -> None:
    one = result["rows"][index]
    found = bench.row(one["model"], one["format"], one["devices"], ("full", "fast"))
    for name, plan in found["plans"].items():
        assert (plan["ms"], plan["axes"]) == (one["plans"][name]["ms"], one["plans"][name]["axes"]), (
            f"{name}: make it again, python bench/planner_baselines.py"
        )


def test_what_does_not_fit_is_a_dash_and_what_is_as_fast_an_equals_sign(bench: ModuleType) -> None:
    plans = {name: {"ms": 2.0, "axes": "DP1 PP1 TP2"} for name in (*bench.SEARCHES, bench.ENGINE, *bench.RULES)}
    plans["redco"]["ms"], plans["bytes only"]["ms"] = 2.5, None
    text = bench.table({"rows": [{"model": "a", "format": "fp6", "devices": 2, "plans": plans}]})
    assert text.splitlines()[-1] == "| a fp6, 2 | 2.00 | = | = | = | = | = | +25.0 % | = | = | - |"
