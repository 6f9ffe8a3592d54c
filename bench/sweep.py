"""Time every configuration that may be the best of a problem, on a GPU of compute capability 9.0, for `bench/costs.py`.

    python bench/sweep.py OUT.csv --n 1,16
    python bench/sweep.py OUT.csv --n 128,256 --activations fp8 --within 1.3 llama-3-8b 5120x5120

Configurations are timed in random order, in chains with programmatic dependent launch: a GPU that has worked for a
while is slower than one that has not. Rows are appended, so that several runs may share a file. `--clusters` also
tries every tile in clusters of two CTAs, which share the activations they fetch, where the table of costs has only the
lone CTA.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tersor.bench import contenders, linear, timing, tune
from tersor.bench.shapes import Shape, resolve
from tersor.cli.bench import numbers, schemes
from tersor.errors import TersorError
from tersor.formats import Scheme
from tersor.hardware import Chip
from tersor.kernels.tune import SM90, LinearConfig, LinearProblem, seconds, sm90
from tersor.ops import dispatch

SHAPES = (
    *("llama-2-70b", "llama-3-8b", "2048x2048", "5120x5120", "13824x5120", "5120x27648", "3584x18944", "1024x8192"),
    *("14336x4096", "28672x8192"),
)
COLUMNS = (
    *("oc", "ic", "format", "activations", "n", "tokens", "row_groups", "channel_groups", "cluster", "resident"),
    *("whole_tiles", "splits", "gathered", "microseconds"),
)
BYTES = 300 << 20
"""Copies of a weight take so much, several times L2."""


def plausible(problem: LinearProblem, chip: Chip, within: float) -> list[LinearConfig]:
    """Return the configurations of the sm90 schedule predicted to take up to `within` times the least time."""
    times = {
        config: seconds(problem, config, chip)
        for config in tune.worth_measuring(problem, chip)
        if config.schedule == SM90
    }
    return [config for config, time in times.items() if time <= within * min(times.values())]


def row(shape: Shape, scheme: Scheme, activations: str, n: int, config: LinearConfig, microseconds: float) -> list[str]:
    """Return what `bench/costs.py` reads of one time, in the order of COLUMNS."""
    tile = sm90.tile_of(config)
    numbers = (tile.tokens, tile.row_groups, tile.channel_groups, tile.cluster, tile.resident)
    plan = (config.whole_tiles, config.splits, int(config.gathered), f"{microseconds:.2f}")
    return [str(value) for value in (shape.oc, shape.ic, contenders.label(scheme), activations, n, *numbers, *plan)]


def sweep(
    shapes: Sequence[Shape],
    formats: Sequence[Scheme],
    activations: str,
    tokens: Sequence[int],
    within: float,
    turns: int,
) -> Iterator[list[str]]:
    """Time and yield rows, a weight at a time."""
    device = torch.device("cuda", torch.cuda.current_device())
    chip, shuffled = dispatch.chip(device), random.Random(0)
    for shape in shapes:
        for scheme in formats:
            weight = contenders.packed(scheme, shape.oc, shape.ic, torch.float16, activations)[0]
            copies = timing.copies(weight.nbytes, BYTES)
            weights = [replace(weight, data=weight.data.clone(), scale=weight.scale.clone()) for _ in range(copies)]
            xs = {n: contenders.random(n, shape.ic, torch.float16) for n in tokens}
            problems = {n: linear.problem_of(shape, scheme, n, activations) for n in tokens}
            jobs = [(n, config) for n in tokens for config in plausible(problems[n], chip, within)] * turns
            shuffled.shuffle(jobs)
            for index, (n, config) in enumerate(jobs):
                calls = contenders.chained(weights, xs[n], early=True, config=config)
                if index == 0:
                    timing.graph_microseconds(calls, replays=2)  # clocks fell while weights were made
                yield row(shape, scheme, activations, n, config, timing.graph_microseconds(calls, replays=5))


def add_clusters() -> None:
    """Add every tile in clusters of two to the table of costs, with the costs of the lone CTA."""
    for tile, cost in list(sm90.COSTS.items()):
        if tile.cluster == 1 and replace(tile, cluster=2) not in sm90.COSTS:
            sm90.COSTS[replace(tile, cluster=2)] = cost


def main() -> None:
    """Read the command line, sweep, append rows to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT.csv")
    parser.add_argument("shapes", nargs="*", default=SHAPES, help="models or OCxIC")
    parser.add_argument("--n", required=True, help="numbers of tokens")
    parser.add_argument("--formats", default="fp6_e3m2", help="formats, separated by commas")
    parser.add_argument("--activations", default=dispatch.ACTIVATIONS_16BIT, choices=dispatch.ACTIVATIONS)
    parser.add_argument("--within", type=float, default=1.4, help="of the least predicted time; default: 1.4")
    parser.add_argument("--turns", type=int, default=2, help="times of each; default: 2")
    parser.add_argument("--clusters", action="store_true", help="try clusters of two CTAs")
    arguments = parser.parse_intermixed_args()
    try:
        tokens, shapes = numbers("--n", arguments.n), resolve(arguments.shapes)
        formats = schemes(arguments.formats.split(","), shapes)
    except TersorError as error:
        parser.error(str(error))
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("needs a GPU of compute capability 9.0")
    if arguments.clusters:
        add_clusters()
    rows = sweep(shapes, formats, arguments.activations, tokens, arguments.within, arguments.turns)
    is_new = not arguments.output.exists()
    with arguments.output.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for one in rows:
            writer.writerow(one)
            file.flush()


if __name__ == "__main__":
    main()
