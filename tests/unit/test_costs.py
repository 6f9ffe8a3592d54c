"""bench/sweep.py and bench/costs.py: what the one writes the other reads, and a fit makes the chooser lose less."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tersor.bench.linear import problem_of
from tersor.bench.shapes import Shape
from tersor.errors import InputError
from tersor.formats import Activations, get_scheme
from tersor.hardware import CHIPS
from tersor.kernels.tune import seconds, sm90

BENCH = Path(__file__).resolve().parents[2] / "bench"
H200 = CHIPS["NVIDIA H200"]
SHAPES = (Shape(4096, 4096), Shape(8192, 8192), Shape(28672, 4096))
FP6 = get_scheme("fp6_e3m2")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(name="costs")
def costs_script() -> ModuleType:
    return script("costs")


@pytest.fixture(name="sweep")
def sweep_script() -> ModuleType:
    return script("sweep")


def written(sweep: ModuleType, path: Path, factor: float) -> Path:
    """A sweep in which everything takes as long as predicted, but tiles of 192 rows `factor` times that."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(sweep.COLUMNS)
        for shape in SHAPES:
            problem = problem_of(shape, FP6, 8)
            for config in sweep.plausible(problem, H200, 3.0):
                time = seconds(problem, config, H200) * 1e6 * (factor if config.row_groups == 3 else 1)
                writer.writerow(sweep.row(shape, FP6, "16bit", 8, config, time))
    return path


def test_the_kept_sweep_and_what_the_chooser_loses_by_it(costs: ModuleType) -> None:
    path = BENCH / "results" / "sweep_h200.csv"
    times = costs.read([path])
    with path.open(newline="") as file:
        rows = sum(1 for _ in file) - 1
    assert sum(map(len, times.values())) == rows, "every row is a candidate"
    losses = [costs.loss(problem, timed) for (_, problem), timed in times.items()]
    assert sum(losses) / len(losses) < 1.015
    assert max(losses) < 1.12
    table = costs.table(times)
    assert "int4:g128 16bit     16        16" in table
    assert table.count("\n") == len({(name, problem.n) for name, problem in times})


def test_what_a_sweep_writes_is_read(sweep: ModuleType, costs: ModuleType, tmp_path: Path) -> None:
    times = costs.read([written(sweep, tmp_path / "one.csv", 1.0)])
    assert [(name, problem.oc) for name, problem in times] == [("fp6_e3m2 16bit", shape.oc) for shape in SHAPES]
    for (_, problem), timed in times.items():
        assert set(timed) == set(sweep.plausible(problem, H200, 3.0))
        assert costs.loss(problem, timed) == 1.0
        for config, time in timed.items():
            assert time == pytest.approx(seconds(problem, config, H200) * 1e6, abs=0.01)


def test_a_configuration_that_is_no_candidate_is_left_out(
    sweep: ModuleType, costs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(sweep, tmp_path / "one.csv", 1.0)
    before = sum(map(len, costs.read([path]).values()))
    tiles = {tile: cost for tile, cost in sm90.COSTS.items() if (tile.tokens, tile.row_groups) != (8, 3)}
    monkeypatch.setattr(sm90, "COSTS", tiles)
    times = costs.read([path])
    assert 0 < sum(map(len, times.values())) < before
    assert {config.row_groups for timed in times.values() for config in timed} == {1, 2}


def test_tiles_to_try(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm90, "COSTS", dict(sm90.COSTS))
    assert sweep.tile("64,2,1,2,1,fp8") == sm90.Tile(64, 2, 1, 2, 1, Activations.E4M3)
    new = sweep.tile("64,2,1,2,1")
    sweep.add(new)
    assert sm90.COSTS[new] == sm90.COSTS[sm90.Tile(64, 2, 1, 1, 1)]
    found = sweep.plausible(problem_of(SHAPES[1], FP6, 64), H200, 2.0)
    assert {config.cluster for config in found} == {1, 2}
    assert {config.row_tiles % config.cluster for config in found} == {0}
    for text in ("64,2,1,2", "64,2,1,2,x", "64,2,1,2,1,fp16", ""):
        with pytest.raises(InputError, match="expected five numbers"):
            sweep.tile(text)
    with pytest.raises(InputError, match="no tile of 24 tokens"):
        sweep.add(sm90.Tile(24, 2, 1, 1, 1))


def test_a_fit_follows_the_times(sweep: ModuleType, costs: ModuleType, tmp_path: Path) -> None:
    before = dict(sm90.COSTS)
    times = costs.read([written(sweep, tmp_path / "one.csv", 0.5)])
    wrong = costs.soft_loss(times)
    found = costs.fit(times, [8], generations=12)
    assert before == sm90.COSTS
    assert {(tile.tokens, tile.row_groups) for tile in found} == {(8, 1), (8, 2), (8, 3)}
    assert found[sm90.Tile(8, 3, 1, 1, 1)].lonely == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sm90, "COSTS", {**before, **found})
        assert costs.soft_loss(times) < 0.8 * wrong
