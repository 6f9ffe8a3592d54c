"""bench/token_counts.py: which numbers of tokens are timed, and which times miss a target."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tersor.bench.contenders import PDL, Contender, UnfitError
from tersor.bench.shapes import Shape

SHAPE, LARGE, SMALL = Shape(5120, 5120), Shape(8192, 8192), Shape(2048, 2048)


@pytest.fixture(name="counts")
def counts_script() -> Iterator[ModuleType]:
    path = Path(__file__).resolve().parents[2] / "bench" / "token_counts.py"
    spec = importlib.util.spec_from_file_location("token_counts", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["token_counts"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["token_counts"]


def test_numbers_of_tokens_are_a_grid_and_random_ones(counts: ModuleType) -> None:
    tokens = counts.counts(8, 40)
    assert tokens == sorted(set(tokens)) and 100 <= len(tokens) <= 104 and max(tokens) <= 4096
    assert set(range(8, 513, 8)) <= set(tokens)
    assert counts.counts(128, 0) == [128, 256, 384, 512]


def test_every_target_is_missed_where_it_should_be(counts: ModuleType, tmp_path: Path) -> None:
    times = {
        (SHAPE, 64): {"fp6": 10.0, "cublas": 10.0, "humming fp6": 11.0, "fp6:a8": 9.0, "fp8": 5.0},
        (SHAPE, 72): {"fp6": 9.8, "cublas": 9.0, "humming fp6": 9.9},
        (SHAPE, 80): {"fp6": 9.6, "cublas": 12.0, "humming fp6": 9.0},
        (LARGE, 56): {"fp6:a8": 9.0, "fp8": 5.0},
        (LARGE, 64): {"fp6:a8": 6.0, "fp8": 5.0, "humming fp6:a8": 5.0, "humming fp6": 1.0},
        (SMALL, 64): {"fp6": 99.0, "cublas": 1.0},
    }
    found = [(one.target, one.shape, one.n, one.against) for one in counts.missed(counts.ratios(times))]
    assert found == [
        ("rising", LARGE, 56, "N=64"),
        ("humming", LARGE, 64, "humming fp6:a8"),
        ("cublas", SHAPE, 72, "cublas"),
        ("humming", SHAPE, 80, "humming fp6"),
        ("fp8", LARGE, 64, "fp8"),
        ("rising", SHAPE, 64, "N=80"),
    ]
    lines = counts.summary(times).splitlines()
    assert lines[0] == "5120x5120: 3 numbers of tokens" and lines[2] == "2048x2048: 1 numbers of tokens"
    assert "cublas   fp6: 1 of 3 cells miss 1.00; ratio 0.955 on average, worst 1.09" in lines
    assert lines[-6].startswith("rising    1.50 (may be 1.03)  8192x8192 N=56 fp6:a8 against N=64")
    for cell, of_cell in times.items():
        counts.append(tmp_path / "times.csv", {cell: of_cell})
    assert counts.read(tmp_path / "times.csv") == times


def test_the_committed_times_are_of_all_shapes_and_numbers_of_tokens(counts: ModuleType) -> None:
    times = counts.read(Path(counts.__file__).parent / "results" / "token_counts_h200.csv")
    assert {str(shape) for shape, _ in times} == {*counts.KNOWN, *counts.NEW}
    for n in counts.counts(8, 40):
        assert all({"cublas", "fp8", "fp6_e3m2", "fp6_e3m2:a8"} <= set(times[shape, n]) for shape, _ in times)


def test_a_shape_is_measured_up_and_down(counts: ModuleType) -> None:
    timed: list[tuple[str, int]] = []
    said: list[str] = []

    def contender(name: str) -> Contender:
        def build(oc: int, ic: int) -> object:
            if name == "humming fp6":
                raise UnfitError("not for this shape")
            return lambda n, chain: [(name, n)]

        return Contender(name=name, chains=(PDL,), weight_bytes=lambda oc, ic: 1, build=build)  # type: ignore[arg-type]

    def microseconds(calls: list[tuple[str, int]]) -> float:
        (job,) = calls
        timed.append(job)
        if job == ("cublas", 24):
            raise UnfitError("no such product")
        return {"fp6": 5.0, "cublas": 10.0}[job[0]] + job[1] / 100 + (1.0 if timed.count(job) == 1 else 0.0)

    rivals = [contender(name) for name in ("fp6", "cublas", "humming fp6")]
    found = counts.measure(SHAPE, [16, 8, 24], rivals, microseconds, said.append)
    assert found == {
        (SHAPE, 16): {"fp6": 5.16, "cublas": 10.16},
        (SHAPE, 8): {"fp6": 5.08, "cublas": 10.08},
        (SHAPE, 24): {"fp6": 5.24},
    }
    assert [n for name, n in timed if name == "fp6"] == [8, 8, 16, 24, 24, 16, 8]
    assert said == [
        "5120x5120: humming fp6 is not timed: not for this shape",
        "5120x5120 N=24: cublas is not timed: no such product",
    ]
