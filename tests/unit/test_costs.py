"""bench/sweep.py, bench/costs.py and the files of costs: what one writes another reads, and a fit loses less."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tersor.bench.linear import problem_of
from tersor.bench.shapes import Shape
from tersor.errors import InputError
from tersor.formats import Activations, get_scheme
from tersor.hardware import CHIPS
from tersor.kernels.tune import cost, seconds, sm90

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
        rows = {tuple(row[:-1]) for row in csv.reader(file)}
    assert sum(map(len, times.values())) == len(rows) - 1, "every row is a candidate"
    losses = [costs.loss(problem, timed) for (_, problem), timed in times.items()]
    assert sum(losses) / len(losses) < 1.0085
    assert max(losses) < 1.11
    many = [costs.loss(problem, timed) for (_, problem), timed in times.items() if problem.n > 16]
    assert sum(many) / len(many) < 1.009
    assert max(many) < 1.095
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
    for tile in list(cost.of(H200.name)):
        if (tile.tokens, tile.row_groups) == (8, 3):
            monkeypatch.delitem(cost.of(H200.name), tile)
    times = costs.read([path])
    assert 0 < sum(map(len, times.values())) < before
    assert {config.row_groups for timed in times.values() for config in timed} == {1, 2}


def test_tiles_to_try(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    present = dict(cost.of(H200.name))
    monkeypatch.setattr(cost, "of", lambda chip: present)
    for text, kind in (("fp8", Activations.E4M3), ("int8", Activations.INT8)):
        assert sweep.tile(f"64,2,1,2,1,{text}") == sm90.Tile(64, 2, 1, 2, 1, kind)
    new = sweep.tile("64,2,1,2,1")
    sweep.add(new)
    assert present[new] == present[sm90.Tile(64, 2, 1, 1, 1)]
    found = sweep.plausible(problem_of(SHAPES[1], FP6, 64), H200, 2.0)
    assert {config.cluster for config in found} == {1, 2}
    assert {config.row_tiles % config.cluster for config in found} == {0}
    for text in ("64,2,1,2", "64,2,1,2,x", "64,2,1,2,1,fp16", ""):
        with pytest.raises(InputError, match="expected five numbers"):
            sweep.tile(text)
    with pytest.raises(InputError, match="no tile of 24 tokens"):
        sweep.add(sm90.Tile(24, 2, 1, 1, 1))


def test_a_sweep_times_the_best_of_every_tile_first_and_what_is_near_the_best_again(sweep: ModuleType) -> None:
    arguments, cells = sweep.parsed(["out.csv", "8192x8192", "1280x8192", "--n", "40,200", "--turns", "2"])
    assert len(cells) == 8 and {cell.activations for cell in cells} == {Activations.NATIVE, Activations.E4M3}
    wanted = {cell: sweep.ranked(sweep.plausible(cell.problem, H200, 1.6))[: arguments.most] for cell in cells}
    for configs in wanted.values():
        tiles = [sm90.tile_of(config) for config in configs]
        assert len(set(tiles[: len(set(tiles))])) == len(set(tiles)), "no tile twice before each was there once"
    assert {source.header for source in sweep.sources(wanted)} == {
        "dense/sm90_linear.cuh",
        "dense/quantize_activations.cuh",
    }

    def timed(cell: Any, config: Any) -> float:
        return seconds(cell.problem, config, H200) * 1e6

    jobs = sum(map(len, wanted.values()))
    all_of_it = list(sweep.sweep(wanted, timed, lambda: True, 2))
    assert len({(cell, config) for cell, config, _ in all_of_it[:jobs]}) == jobs
    assert {cell for cell, _, _ in all_of_it[: len(cells) * sweep.ROUND]} == set(cells)
    least = {cell: min(timed(cell, config) for config in configs) for cell, configs in wanted.items()}
    assert all_of_it[jobs:], "something is timed again"
    assert all(microseconds <= sweep.NEAR * least[cell] for cell, _, microseconds in all_of_it[jobs:])
    left = iter([True] * 5 + [False])
    assert list(sweep.sweep(wanted, timed, lambda: next(left), 2)) == all_of_it[:5]


def test_the_first_of_large_products_is_timed_again_once_the_gpu_is_warm(sweep: ModuleType) -> None:
    _, (cell,) = sweep.parsed(["out.csv", "8192x8192", "--n", "200", "--activations", "16bit"])
    configs = sweep.plausible(cell.problem, H200, 1.6)[:2]
    for cold, times in ((100.0, [100.0, 200.0]), (180.0, [200.0, 200.0])):
        left = iter([cold, 200.0, 200.0])
        found = list(sweep.sweep({cell: configs}, lambda cell, config, left=left: next(left), lambda: True, 1))
        assert [microseconds for _, _, microseconds in found] == times


def test_a_configuration_that_fails_is_named_and_the_sweep_goes_on(sweep: ModuleType) -> None:
    _, (cell,) = sweep.parsed(["out.csv", "8192x8192", "--n", "200", "--activations", "16bit"])
    configs = sweep.plausible(cell.problem, H200, 1.6)
    said: list[str] = []

    def timed(cell: Any, config: Any) -> float:
        if config == configs[1]:
            raise RuntimeError("launch\nfailed")
        return 5.0

    checked = sweep.guarded(timed, said.append, lambda: None)
    found = list(sweep.sweep({cell: configs}, checked, lambda: True, 1))
    assert {config for _, config, _ in found} == set(configs) - {configs[1]}
    assert said == [f"failed: 8192x8192 N=200 16bit, {configs[1]}: launch failed"]

    def dead() -> None:
        raise RuntimeError("illegal address")

    with pytest.raises(RuntimeError, match="illegal address"):
        list(sweep.sweep({cell: configs}, sweep.guarded(timed, said.append, dead), lambda: True, 1))


def test_a_fit_follows_the_times(sweep: ModuleType, costs: ModuleType, tmp_path: Path) -> None:
    before = dict(cost.of(H200.name))
    times = costs.read([written(sweep, tmp_path / "one.csv", 0.5)])
    wrong = costs.soft_loss(times)
    found = costs.fit(times, [8], generations=12)
    assert before == cost.of(H200.name)
    assert {(tile.tokens, tile.row_groups) for tile in found} == {(8, 1), (8, 2), (8, 3)}
    assert found[sm90.Tile(8, 3, 1, 1, 1)].lonely == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "of", lambda chip: {**before, **found})
        assert costs.soft_loss(times) < 0.8 * wrong


def test_tiles_that_could_go_are_named_the_least_missed_first(costs: ModuleType) -> None:
    problem = problem_of(SHAPES[1], FP6, 200)
    by_tile = {sm90.tile_of(config): config for config in sm90.candidates(problem, H200)}
    (best, near, far), tiles = list(by_tile.values())[:3], list(by_tile)[:3]
    times = {("fp6", problem): {best: 10.0, near: 10.1, far: 12.0}}
    assert costs.dispensable(times, 0.02) == {tiles[2]: (0.0, 0.0), tiles[1]: (0.0, 0.0)}
    other = problem_of(SHAPES[0], FP6, 200)
    times["fp6", other] = {best: 10.1, near: 10.0}
    assert costs.dispensable(times, 0.02) == {
        tiles[2]: (0.0, 0.0),
        tiles[0]: (pytest.approx(0.005), pytest.approx(0.01)),
    }
    assert costs.dispensable(times, 0.001) == {tiles[2]: (0.0, 0.0)}


def test_a_fit_is_written_as_the_package_reads_it(costs: ModuleType) -> None:
    shipped = (Path(cost.__file__).parent / "costs" / "h200.json").read_text(encoding="utf-8")
    chip, found = cost.parse(shipped, "h200.json")
    assert (chip, found) == (H200.name, cost.of(H200.name))
    fitted_to = json.loads(shipped)["fitted_to"]
    kinds = {entry["tile"]["activations"] for entry in json.loads(shipped)["tiles"]}
    assert (
        costs.text(H200, {tile: one for tile, one in found.items() if tile.activations in kinds}, fitted_to) == shipped
    )
    tile = sm90.Tile(128, 2, 1, 1, 1, Activations.E4M3)
    changed = {**found, tile: replace(found[tile], start=1.25)}
    assert cost.parse(costs.text(H200, changed, "12 launches"), "new.json") == (H200.name, changed)


def test_tiles_for_int8_that_a_file_does_not_list_cost_what_those_for_e4m3_do(costs: ModuleType) -> None:
    fitted = {tile: one for tile, one in cost.of(H200.name).items() if tile.activations.dtype is not torch.int8}
    _, found = cost.parse(costs.text(H200, fitted, "12 launches"), "new.json")
    more = {tile: one for tile, one in found.items() if tile not in fitted}
    assert len(more) > 20 and all(found[replace(tile, activations=Activations.E4M3)] == more[tile] for tile in more)
    tile = sm90.Tile(128, 2, 1, 1, 1, Activations.INT8)
    in_groups = replace(tile, activations=Activations.INT8_GROUPS)
    own = dict.fromkeys((tile, in_groups), replace(more[tile], start=1.25))
    own = {**fitted, **own}
    assert cost.parse(costs.text(H200, {**fitted, tile: own[tile]}, "12 launches"), "new.json") == (H200.name, own)
    assert cost.parse(costs.text(H200, own, "12 launches"), "new.json") == (H200.name, own)


def test_the_command_fits_and_writes_a_file_of_costs(
    sweep: ModuleType,
    costs: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, before = written(sweep, tmp_path / "one.csv", 0.5), dict(cost.of(H200.name))
    better = {tile: replace(one, start=0.9) for tile, one in before.items() if tile.tokens == 8}
    monkeypatch.setattr(costs, "fit", lambda times, tokens, seed, chip: better)
    monkeypatch.setattr("sys.argv", ["costs.py", str(path), "--fit", "8", "--write", str(tmp_path / "h200.json")])
    try:
        costs.main()
        written_costs = cost.parse((tmp_path / "h200.json").read_text(), "h200.json")
        assert written_costs == (H200.name, {**before, **better})
    finally:
        cost.of(H200.name).update(before)
    assert "fp6_e3m2 16bit" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["costs.py", str(path), "--write", str(tmp_path / "other.json")])
    with pytest.raises(SystemExit):
        costs.main()
    assert "--write needs --fit" in capsys.readouterr().err


def test_a_chip_without_a_file_has_the_costs_of_an_h200() -> None:
    assert cost.of("NVIDIA H100") is cost.of(H200.name)
    assert cost.of("NVIDIA H20") is cost.of(H200.name)


def test_a_chip_has_the_costs_of_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, costs: ModuleType
) -> None:
    slow = {tile: replace(one, start=99.0) for tile, one in cost.of(H200.name).items()}
    h100, folder = CHIPS["NVIDIA H100"], tmp_path / "costs"
    folder.mkdir()
    (folder / "h200.json").write_text(costs.text(H200, cost.of(H200.name), ""))
    (folder / "h100.json").write_text(costs.text(h100, slow, ""))
    (folder / "h100_nvl.json").write_text(costs.text(h100, slow, ""))
    (folder / "h100_pcie.json").write_text(costs.text(CHIPS["NVIDIA H100 PCIe"], dict(list(slow.items())[1:]), ""))
    monkeypatch.setattr(cost.resources, "files", lambda package: tmp_path)
    cost.of.cache_clear()
    try:
        assert {one.start for one in cost.of(h100.name).values()} == {99.0}
        problem = problem_of(SHAPES[0], FP6, 8)
        config = next(iter(sm90.candidates(problem, H200)))
        assert seconds(problem, config, h100) > 90e-6 > seconds(problem, config, H200)
        with pytest.raises(InputError, match=r"costs/h100_nvl.json is for NVIDIA H100, not for NVIDIA H100 NVL"):
            cost.of("NVIDIA H100 NVL")
        with pytest.raises(InputError, match="costs of NVIDIA H100 PCIe are of other tiles"):
            cost.of("NVIDIA H100 PCIe")
    finally:
        cost.of.cache_clear()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.pop("unit"), "expected an object with chip, fitted_to, kind, tiles, unit, version"),
        (lambda file: file.update(version=2), "version 1, in microseconds"),
        (lambda file: file.update(unit="seconds"), "version 1, in microseconds"),
        (lambda file: file.update(chip=7), "chip is a text, tiles is a list"),
        (lambda file: file["tiles"].append(file["tiles"][3]), "is there twice"),
        (lambda file: file["tiles"][1].pop("cost"), "entry 1: expected tile and cost"),
        (lambda file: file["tiles"][1]["cost"].pop("gather"), "entry 1: fields ['gather'] are unknown or missing"),
        (lambda file: file["tiles"][1]["tile"].update(rows=64), "entry 1: fields ['rows'] are unknown or missing"),
        (lambda file: file["tiles"][1]["cost"].update(block=-0.1), "entry 1: block is -0.1"),
        (lambda file: file["tiles"][1]["cost"].update(block=True), "entry 1: block is True"),
        (lambda file: file["tiles"][1]["tile"].update(tokens=8.0), "entry 1: tokens is 8.0"),
        (lambda file: file["tiles"][1]["tile"].update(activations="int4"), "'int4' is not a valid Activations"),
        (lambda file: file["tiles"][1].update(tile=[8, 1, 2]), "entry 1: tile and cost are objects"),
    ],
)
def test_a_file_of_costs_that_makes_no_sense_is_an_error(change: Callable[[Any], object], words: str) -> None:
    file = json.loads((Path(cost.__file__).parent / "costs" / "h200.json").read_text(encoding="utf-8"))
    change(file)
    with pytest.raises(InputError) as error:
        cost.parse(json.dumps(file), "mine.json")
    assert str(error.value).startswith("mine.json holds no costs of tiles (")
    assert words in str(error.value)
