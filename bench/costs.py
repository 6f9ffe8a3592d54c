"""How much does the chooser lose, by times that `bench/sweep.py` took, and which costs would make it lose less?

    python bench/costs.py SWEEP.csv [SWEEP.csv ...]
    python bench/costs.py SWEEP.csv --fit 8,16 --write src/tersor/kernels/tune/costs/h200.json
    python bench/costs.py SWEEP.csv --chip "NVIDIA H100" --fit 8,16,32,64,128,256 --write .../costs/h100.json

The loss of a problem is the time of the configuration that the chip's costs (kernels/tune/costs) choose among those
that were timed, over the least time. `--fit` finds new costs of the tiles of so many tokens, which takes minutes and
needs SciPy; `--write` puts them into a file of costs, with those of all other tiles as they were.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TypeAlias

from tersor.bench.linear import problem_of
from tersor.bench.shapes import Shape
from tersor.cli.bench import numbers, schemes
from tersor.errors import InputError
from tersor.hardware import CHIPS, Chip, chip_named
from tersor.kernels.tune import LinearConfig, LinearProblem, cost, seconds, sm90

CHIP = CHIPS["NVIDIA H200"]
Times: TypeAlias = dict[tuple[str, LinearProblem], dict[LinearConfig, float]]
"""(format and activations, problem) -> configuration -> microseconds, the mean of all times."""

SOFTNESS = 0.02
"""Configurations predicted within about so much of the best count as chosen, in part: the loss stays smooth."""
FIDELITY = 0.25
"""Weight of the mean error of predicted times beside the mean loss."""
BOUNDS = ((0.3, 2.5), (0.75, 1.25), (0.0, 0.2), (0.0, 4.0), (0.2, 2.5), (0.0, 1.3), (0.02, 0.5), (0.1, 1.0))
"""Of each field of `Cost`, wider where it lies outside now; `block` is in units of what it is now."""


def read(paths: Iterable[Path], chip: Chip = CHIP) -> Times:
    """Read sweeps; times of configurations that are no candidates any more are left out."""
    found: dict[tuple[str, LinearProblem], dict[LinearConfig, list[float]]] = defaultdict(lambda: defaultdict(list))
    known: dict[LinearProblem, dict[tuple[object, ...], LinearConfig]] = {}
    for path in paths:
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                shape = Shape(int(line["oc"]), int(line["ic"]))
                (scheme,) = schemes([line["format"]], [shape])
                problem = problem_of(shape, scheme, int(line["n"]), line["activations"])
                if problem not in known:
                    known[problem] = {_key(config): config for config in sm90.candidates(problem, chip)}
                tile = ("tokens", "row_groups", "channel_groups", "cluster", "resident")
                splitting = ("whole_tiles", "splits", "gathered")
                config = known[problem].get(tuple(int(line[name]) for name in (*tile, *splitting)))
                if config is not None:
                    found[f"{line['format']} {line['activations']}", problem][config].append(
                        float(line["microseconds"])
                    )
    return {
        problem: {config: statistics.mean(times) for config, times in timed.items()} for problem, timed in found.items()
    }


def _key(config: LinearConfig) -> tuple[object, ...]:
    *sizes, _ = astuple(sm90.tile_of(config))
    return (*sizes, config.whole_tiles, config.splits, int(config.gathered))


def loss(problem: LinearProblem, timed: Mapping[LinearConfig, float], chip: Chip = CHIP) -> float:
    """Return the time of the choice among the timed configurations over the least time."""
    return timed[min(timed, key=lambda config: seconds(problem, config, chip))] / min(timed.values())


def table(times: Times, chip: Chip = CHIP) -> str:
    """Return the mean and the worst loss for each format, kind of activations and number of tokens."""
    groups = defaultdict(list)
    for (name, problem), timed in times.items():
        groups[name, problem.n].append((loss(problem, timed, chip), f"{problem.oc}x{problem.ic}"))
    lines = ["format               N  problems  mean loss  worst"]
    for (name, n), losses in sorted(groups.items()):
        mean, (worst, shape) = statistics.mean(one for one, _ in losses), max(losses)
        lines.append(f"{name:17} {n:4} {len(losses):9} {mean - 1:9.1%} {worst - 1:7.1%} {shape}")
    return "\n".join(lines)


def soft_loss(times: Times, chip: Chip = CHIP) -> float:
    """Return the mean loss of a choice that is undecided between nearly equal predictions, plus a share of their error.

    It changes with every cost, where the loss itself is a step function.
    """
    lost = error = 0.0
    count = 0
    for (_, problem), timed in times.items():
        predicted = [math.log(seconds(problem, config, chip) * 1e6) for config in timed]
        measured = list(timed.values())
        least = min(predicted)
        weights = [math.exp((least - one) / SOFTNESS) for one in predicted]
        chosen = sum(weight * one for weight, one in zip(weights, measured, strict=True)) / sum(weights)
        lost += chosen / min(measured) - 1
        error += sum(abs(one - math.log(time)) for one, time in zip(predicted, measured, strict=True))
        count += len(measured)
    return lost / len(times) + FIDELITY * error / count


def fit(
    times: Times, tokens: Sequence[int], seed: int = 0, generations: int = 150, chip: Chip = CHIP
) -> dict[sm90.Tile, cost.Cost]:
    """Return costs of the tiles of so many tokens that make `soft_loss` small; the chip's are left as they were.

    Differential evolution (Storn and Price, 1997) from the present costs. A CTA that has its multiprocessor to itself
    anyway has no `lonely`.
    """
    from scipy.optimize import differential_evolution

    used = {sm90.tile_of(config) for timed in times.values() for config in timed}
    present = cost.of(chip.name)
    tiles = [tile for tile in present if tile.tokens in tokens and tile in used]
    relevant = {key: timed for key, timed in times.items() if any(sm90.tile_of(config) in tiles for config in timed)}
    before = dict(present)

    def costs(values: Sequence[float]) -> dict[sm90.Tile, cost.Cost]:
        found = {}
        for index, tile in enumerate(tiles):
            start, block, lonely, *rest = values[len(BOUNDS) * index :][: len(BOUNDS)]
            found[tile] = cost.Cost(start, block * before[tile].block, lonely * (tile.resident > 1), *rest)
        return found

    def goal(values: Sequence[float]) -> float:
        present.update(costs(values))
        return soft_loss(relevant, chip)

    now, bounds = [], []
    for tile in tiles:
        start, _, *rest = astuple(before[tile])
        for one, (low, high) in zip((start, 1.0, *rest), BOUNDS, strict=True):
            now.append(one)
            bounds.append((min(low, one) - 1e-6, max(high, 1.2 * one)))
    try:
        found = differential_evolution(goal, bounds, x0=now, maxiter=generations, popsize=5, seed=seed, polish=False)
    finally:
        present.update(before)
    return {
        tile: cost.Cost(*(max(0.0, float(f"{one:.3g}")) for one in astuple(fitted)))
        for tile, fitted in costs(found.x).items()
    }


def text(chip: Chip, costs: Mapping[sm90.Tile, cost.Cost], fitted_to: str) -> str:
    """Return the file of a chip's costs, a tile a line, as `kernels/tune/cost.py` reads it."""
    head = {"kind": cost.KIND, "version": cost.VERSION, "chip": chip.name, "unit": cost.UNIT, "fitted_to": fitted_to}
    tiles = [
        json.dumps({"tile": asdict(tile), "cost": _short(asdict(one))}, allow_nan=False) for tile, one in costs.items()
    ]
    return json.dumps(head, indent=1, allow_nan=False)[:-2] + ',\n "tiles": [\n  ' + ",\n  ".join(tiles) + "\n ]\n}\n"


def _short(numbers: Mapping[str, float]) -> dict[str, float]:
    """Write whole numbers without a point."""
    return {name: int(value) if value == int(value) else value for name, value in numbers.items()}


def main() -> None:
    """Print what the present costs lose, and with `--fit` better ones and what those lose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP.csv")
    parser.add_argument("--fit", metavar="TOKENS", help="tokens of the tiles whose costs are fitted")
    parser.add_argument("--write", type=Path, metavar="FILE.json", help="file of costs that takes the fitted ones")
    parser.add_argument("--chip", default=CHIP.name, help=f"chip that was swept; default: {CHIP.name}")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        tokens, chip = numbers("--fit", arguments.fit) if arguments.fit else [], chip_named(arguments.chip)
    except InputError as error:
        parser.error(str(error))
    if arguments.write and not tokens:
        parser.error("--write needs --fit")
    times = read(arguments.sweeps, chip)
    print(table(times, chip))
    if tokens:
        present = cost.of(chip.name)
        present.update(fit(times, tokens, arguments.seed, chip=chip))
        print(f"\n{table(times, chip)}")
        if arguments.write:
            launches = f"{sum(map(len, times.values()))} launches of {', '.join(sorted({name for name, _ in times}))}"
            arguments.write.write_text(text(chip, present, launches), encoding="utf-8")


if __name__ == "__main__":
    main()
