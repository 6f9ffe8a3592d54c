"""bench/planner_scale.py: the table of docs/planning.md is that of its result, and a search takes seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(name="bench")
def scale_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    import planner_scale

    yield planner_scale
    for name in {"planner_scale", "results_file"} - before:
        sys.modules.pop(name, None)


def test_the_table_of_the_page_is_that_of_the_result_which_has_every_search(bench: ModuleType) -> None:
    result = json.loads((FOLDER / "results" / f"{bench.NAME}.json").read_text(encoding="utf-8"))
    text = bench.PAGE.read_text(encoding="utf-8")
    assert bench.page(text, result) == text, "make it again: python bench/planner_scale.py --write"
    found = [(one["model"], one["format"], one["objective"], one["devices"], one["space"]) for one in result["rows"]]
    wanted = product(bench.MODELS, bench.OBJECTIVES, bench.DEVICES, bench.SPACES)
    assert found == [(*model, *rest) for model, *rest in wanted]
    assert max(one["seconds"] for one in result["rows"]) < 10


def test_a_search_of_today_finds_what_the_result_says(bench: ModuleType) -> None:
    result = json.loads((FOLDER / "results" / f"{bench.NAME}.json").read_text(encoding="utf-8"))
    for space in bench.SPACES:
        found = bench.row("llama-3-8b", "fp6_e3m2", space, "latency", 64, runs=1)
        (kept,) = [
            one for one in result["rows"] if all(one[name] == found[name] for name in found if name != "seconds")
        ]
        assert kept["space"] == space and found["seconds"] > 0
