"""bench/calibrate.py: blocks of a tiny model are timed in every phase, and a whole model takes what its blocks do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from helpers import calibrated

from tersor import compress

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(name="script", scope="module")
def calibrate_script() -> Iterator[ModuleType]:
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    try:
        import calibrate

        yield calibrate
    finally:
        sys.path.remove(str(BENCH))
        for name in {"calibrate", "geometries", "results_file"} - before:
            sys.modules.pop(name, None)


def test_every_block_is_timed_in_every_phase(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compress.RECIPES, "gptq", calibrated.quick(compress.RECIPES["gptq"]))
    words = ["--device", "cpu", "--layers", "2", "--windows", "2", "--window", "16", "--paths", "high,mix"]
    rows = script.main([*words, "--format", "fp6", "--group-size", "0"])
    assert [(row["path"], {phase: len(some) for phase, some in row["seconds"].items()}) for row in rows] == [
        ("mix", {"forward": 2, "backward": 2}),
        ("high", {"forward": 2, "backward": 1, "codes": 2}),
    ]
    assert all(row["whole"] > 0 and row["writing"] > 0 and row["host_bytes"] > 1e8 for row in rows)
    assert len(rows[1]["codes_by_layer"]) == 7 and not rows[0]["codes_by_layer"]
    assert "codes of the last block: " in capsys.readouterr().out


def test_weights_with_a_mask_are_timed_as_those_without(script: ModuleType) -> None:
    words = ["--device", "cpu", "--layers", "2", "--windows", "2", "--window", "16", "--group-size", "16"]
    rows = script.main([*words, "--paths", "pruned,outliers,normal"])
    assert [row["path"] for row in rows] == ["normal", "outliers", "pruned"]
    assert all(len(row["seconds"]["codes"]) == 2 and len(row["codes_by_layer"]) == 7 for row in rows)


def test_a_whole_model_takes_the_usual_time_of_a_block_and_once_what_only_the_first_takes(script: ModuleType) -> None:
    clock = [0.0, 5.0, 8.0, 9.0, 10.0]  # 5 s to begin, blocks of 3, 1 and 1 s
    row = script.summed("normal", clock, 3, 32)
    assert (row["of_block"], row["once"], row["whole"]) == ({"codes": 1.0}, 7.0, 39.0)
    row = script.summed("mix", [0.0, 3.0, 4.0, 5.0, 8.0, 10.0], 2, 10)
    assert (row["of_block"], row["once"], row["whole"]) == ({"forward": 1.0, "backward": 2.0}, 4.0, 34.0)
    with pytest.raises(SystemExit, match="1 reports of progress"):
        script.summed("normal", clock, 2, 32)


def test_a_path_that_is_not_there_is_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--paths", "normal,low"])
    assert "--paths takes normal, mix, high, outliers, pruned" in capsys.readouterr().err
