"""How much does the chooser lose, by times that `bench/sweep.py` took, and which costs would make it lose less?

    python bench/costs.py SWEEP.csv [SWEEP.csv ...]
    python bench/costs.py SWEEP.csv --fit 8,16 --write src/tersor/kernels/tune/costs/h200.json
    python bench/costs.py SWEEP.csv --spare 0.02
    python bench/costs.py SWEEP.csv --chip "NVIDIA H100" --fit 8,16,32,64,128,256 --write .../costs/h100.json

The loss of a problem is the time of the configuration that the chip's costs (kernels/tune/costs) choose among those
that were timed, over the least time. `--spare` names tiles that could go without any problem taking longer by more
than so much. `--fit` finds new costs of the tiles of so many tokens, which takes minutes and needs SciPy; `--write`
puts them into a file of costs, with those of all other tiles as they were.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, replace
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

SOFTNESS = 0.03
"""Configurations predicted within about so much of the best count as chosen, in part: the loss stays smooth."""
FIDELITY = 1.0
"""Weight of the mean error of predicted times beside the mean loss."""
STEEPNESS = 5.0
"""What a loss of 1 costs beside itself; one of 0.1 costs a tenth of that."""
BOUNDS = ((0.3, 2.5), (0.75, 1.25), (0.0, 0.2), (0.5, 4.0), (0.2, 2.5), (0.0, 1.3), (0.02, 0.5), (0.1, 1.0))
"""Of each field of `Cost`, but of `item` wider where it lies outside now; `block` is in units of what it is now."""


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


def dispensable(times: Times, most: float) -> dict[sm90.Tile, tuple[float, float]]:
    """Return tiles that could go, all of them together, with no problem's least time rising by more than `most`.

    The least missed goes first.

    Returns:
        Tile -> by how much the least time rises without it and those before it, on average over all problems and in
        the worst one.
    """
    cells = [
        {tile: min(time for config, time in timed.items() if sm90.tile_of(config) == tile) for tile in tiles}
        for timed in times.values()
        for tiles in [{sm90.tile_of(config) for config in timed}]
    ]
    gone: dict[sm90.Tile, tuple[float, float]] = {}

    def rises(tile: sm90.Tile) -> tuple[float, float]:
        kept = [
            min((time for one, time in cell.items() if one != tile and one not in gone), default=math.inf)
            / min(cell.values())
            - 1
            for cell in cells
        ]
        return statistics.mean(kept), max(kept)

    left = {tile for cell in cells for tile in cell}
    while left:
        tile, (mean, worst) = min(((tile, rises(tile)) for tile in left), key=lambda one: (one[1], str(one[0])))
        left.remove(tile)
        if worst <= most:
            gone[tile] = mean, worst
    return gone


class Soft:
    """The mean loss of a choice that is undecided between nearly equal predictions, plus a share of their error.

    It changes with every cost, where the loss itself is a step function. The costs that `cost.of` has at the time are
    what `predict` goes by; predictions of one tile are made anew without those of others.
    """

    def __init__(self, times: Times, chip: Chip = CHIP) -> None:
        import numpy as np

        self.chip = chip
        self.launches = [(problem, config) for (_, problem), timed in times.items() for config in timed]
        self.of_tile: dict[sm90.Tile, list[int]] = defaultdict(list)
        for index, (_, config) in enumerate(self.launches):
            self.of_tile[sm90.tile_of(config)].append(index)
        counts = np.array([len(timed) for timed in times.values()])
        self.cell = np.repeat(np.arange(len(counts)), counts)
        self.starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
        self.measured = np.array([time for timed in times.values() for time in timed.values()])
        self.least = np.minimum.reduceat(self.measured, self.starts)
        self.predicted = np.zeros(len(self.launches))
        for tile in self.of_tile:
            self.predict(tile)

    def predict(self, tile: sm90.Tile) -> None:
        """Predict all launches of a tile anew."""
        for index in self.of_tile[tile]:
            self.predicted[index] = math.log(seconds(*self.launches[index], self.chip) * 1e6)

    def error(self, tile: sm90.Tile) -> float:
        """Return the mean error of a tile's predictions, of their logarithms."""
        import numpy as np

        own = self.of_tile[tile]
        return float(np.abs(self.predicted[own] - np.log(self.measured[own])).mean())

    def loss(self) -> float:
        """Return the loss; a great one counts more than several that add up to it."""
        import numpy as np

        near = np.minimum.reduceat(self.predicted, self.starts)
        weights = np.exp((near[self.cell] - self.predicted) / SOFTNESS)
        chosen = np.add.reduceat(weights * self.measured, self.starts) / np.add.reduceat(weights, self.starts)
        lost = chosen / self.least - 1
        error = np.abs(self.predicted - np.log(self.measured)).mean()
        return float((lost + STEEPNESS * lost**2).mean() + FIDELITY * error)


def soft_loss(times: Times, chip: Chip = CHIP) -> float:
    """Return `Soft.loss` with the present costs."""
    return Soft(times, chip).loss()


def fit(
    times: Times, tokens: Sequence[int], seed: int = 0, generations: int = 40, chip: Chip = CHIP, rounds: int = 3
) -> dict[sm90.Tile, cost.Cost]:
    """Return costs of the tiles of so many tokens that make `soft_loss` small; the chip's are left as they were.

    Differential evolution (Storn and Price, 1997) from the present costs, a tile at a time: first predictions of each
    come near its times, then in `rounds` over all tiles the loss becomes small. A CTA that has its multiprocessor to
    itself anyway has no `lonely`, and no tile has less arithmetic than a narrower one (`least_block`).
    """
    from scipy.optimize import differential_evolution

    used = {sm90.tile_of(config) for timed in times.values() for config in timed}
    present = cost.of(chip.name)
    tiles = [tile for tile in sorted(present, key=lambda tile: tile.tokens) if tile.tokens in tokens and tile in used]
    relevant = {key: timed for key, timed in times.items() if any(sm90.tile_of(config) in tiles for config in timed)}
    before, soft = dict(present), Soft(relevant, chip)
    try:
        for turn in range(rounds + 1):
            for tile in tiles:
                now = present[tile]

                def costs(values: Sequence[float], tile: sm90.Tile = tile) -> cost.Cost:
                    start, block, lonely, *rest = values
                    return cost.Cost(start, block * before[tile].block, lonely * (tile.resident > 1), *rest)

                def goal(values: Sequence[float], tile: sm90.Tile = tile, turn: int = turn) -> float:
                    present[tile] = costs(values)
                    soft.predict(tile)
                    return soft.loss() if turn else soft.error(tile)

                start, block, *rest = astuple(now)
                unit, least = before[tile].block, least_block(tile, present)
                x0 = (start, max(block, least) / unit, *rest)
                bounds = [
                    (min(low, one) - 1e-6, max(high, 1.2 * one)) for one, (low, high) in zip(x0, BOUNDS, strict=True)
                ]
                bounds[1] = (max(bounds[1][0], least / unit - 1e-6), max(bounds[1][1], 1.3 * least / unit))
                bounds[3] = BOUNDS[3]
                inside = [min(max(one, low), high) for one, (low, high) in zip(x0, bounds, strict=True)]
                found = differential_evolution(
                    goal, bounds, x0=inside, maxiter=generations, popsize=5, seed=seed, polish=False, tol=1e-4
                )
                goal(found.x)
        return {tile: cost.Cost(*(max(0.0, float(f"{one:.3g}")) for one in astuple(present[tile]))) for tile in tiles}
    finally:
        present.update(before)


def least_block(tile: sm90.Tile, present: Mapping[sm90.Tile, cost.Cost]) -> float:
    """Return what a tile's `block` is at the least: that of the next narrower tile like it, or 0.

    Where a tile waits for bytes, times say little of its arithmetic, by which experts, that have other bytes, would go.
    """
    like = [
        one
        for one in present
        if one.tokens < tile.tokens and one.few == tile.few and replace(one, tokens=tile.tokens) == tile
    ]
    return present[max(like, key=lambda one: one.tokens)].block if like else 0.0


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
    parser.add_argument("--spare", type=float, metavar="SHARE", help="name tiles whose loss costs no more anywhere")
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
    if arguments.spare is not None:
        for tile, (mean, worst) in dispensable(times, arguments.spare).items():
            print(f"without {tile}: {mean:.2%} on average, {worst:.1%} in the worst problem")
    if tokens:
        present = cost.of(chip.name)
        present.update(fit(times, tokens, arguments.seed, chip=chip))
        print(f"\n{table(times, chip)}")
        if arguments.write:
            launches = f"{sum(map(len, times.values()))} launches of {', '.join(sorted({name for name, _ in times}))}"
            arguments.write.write_text(text(chip, present, launches), encoding="utf-8")


if __name__ == "__main__":
    main()
