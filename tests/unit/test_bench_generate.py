"""bench/generate.py: both kinds of geometry run on a CPU, plain and packed, and what is read is counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(name="script", scope="module")
def generate_script() -> Iterator[ModuleType]:
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    try:
        import generate

        yield generate
    finally:
        sys.path.remove(str(BENCH))
        for name in {"generate", "geometries", "results_file"} - before:
            sys.modules.pop(name, None)


def test_a_dense_geometry_reads_all_its_weights(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    rows = script.main(["--device", "cpu", "--batch", "1,2", "--steps", "2", "--layers", "1"])
    assert [(row["weights"], row["batch"]) for row in rows] == [
        ("float32", 1),
        ("float32", 2),
        ("fp6_e3m2:row:float16", 1),
        ("fp6_e3m2:row:float16", 2),
    ]
    assert all(row["ms_per_step"] > 0 and "experts_hit" not in row for row in rows)
    assert rows[0]["read_bytes"] == rows[0]["weight_bytes"] - 4 * 512 * 128
    assert "baseline/this" in capsys.readouterr().out


def test_a_mixture_reads_the_experts_that_tokens_go_to(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    rows = script.main(["--device", "cpu", "--geometry", "qwen3-30b-a3b", "--batch", "1,4", "--steps", "2"])
    assert [row.get("experts") for row in rows] == ["grouped_mm"] * 2 + ["batched_mm"] * 2 + [None] * 2
    one, four = rows[0], rows[1]
    assert one["experts_hit"] == 2 * 2 < four["experts_hit"] <= 2 * 8
    expert = 4 * 3 * 64 * 32
    assert four["read_bytes"] - one["read_bytes"] == expert * (four["experts_hit"] - one["experts_hit"])
    assert rows[4]["read_bytes"] < one["read_bytes"] and rows[4]["weight_bytes"] < one["weight_bytes"]
    best = min(rows[:3:2], key=lambda row: row["ms_per_step"])["experts"]
    assert f"float32 ({best})" in capsys.readouterr().out
