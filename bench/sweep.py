"""Time every configuration that may be the best of a problem, on a GPU of compute capability 9.0, for `bench/costs.py`.

    python bench/sweep.py OUT.csv --n 1,16
    python bench/sweep.py OUT.csv --n 128,256 --activations fp8 --within 1.3 llama-3-8b 5120x5120

Configurations are timed in random order, in chains with programmatic dependent launch: a GPU that has worked for a
while is slower than one that has not. Rows are appended, so that several runs may share a file. `--try` adds tiles that
the table of costs does not have, such as 8,2,2,1,1 (tokens, row groups, channel groups, cluster, resident CTAs) or
64,2,1,2,1,fp8; they are predicted by the costs of a tile like them.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

import torch

from tersor import hardware
from tersor.bench import contenders, linear, tune
from tersor.bench.shapes import Shape, resolve
from tersor.cli.bench import numbers, schemes
from tersor.errors import InputError, TersorError
from tersor.formats import Activations, Scheme
from tersor.hardware import Chip
from tersor.kernels.tune import SM90, LinearConfig, LinearProblem, cost, seconds, sm90

SHAPES = (
    *("llama-2-70b", "llama-3-8b", "2048x2048", "5120x5120", "13824x5120", "5120x27648", "3584x18944", "1024x8192"),
    *("14336x4096", "28672x8192"),
)
COLUMNS = (
    *("oc", "ic", "format", "activations", "n", "tokens", "row_groups", "channel_groups", "cluster", "resident"),
    *("whole_tiles", "splits", "gathered", "microseconds"),
)


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
    *sizes, _ = astuple(sm90.tile_of(config))
    splitting = (config.whole_tiles, config.splits, int(config.gathered), f"{microseconds:.2f}")
    return [str(value) for value in (shape.oc, shape.ic, contenders.label(scheme), activations, n, *sizes, *splitting)]


def sweep(
    shapes: Sequence[Shape],
    formats: Sequence[Scheme],
    activations: str,
    tokens: Sequence[int],
    within: float,
    turns: int,
) -> Iterator[list[str]]:
    """Time and yield rows, a weight at a time."""
    chip = hardware.of_device(torch.cuda.current_device())
    prepare, shuffled = tune.on_gpu(torch.float16, chip, activations), random.Random(0)
    for shape in shapes:
        for scheme in formats:
            timed = prepare(shape, scheme)
            problems = [linear.problem_of(shape, scheme, n, activations) for n in tokens]
            jobs = [(problem, config) for problem in problems for config in plausible(problem, chip, within)] * turns
            shuffled.shuffle(jobs)
            timed(*jobs[0])  # thrown away: clocks fell while weights were made
            for problem, config in jobs:
                yield row(shape, scheme, activations, problem.n, config, timed(problem, config))


def tile(text: str) -> sm90.Tile:
    """Read a tile such as `8,2,2,1,1` or `64,2,1,2,1,fp8`.

    Raises:
        InputError: five numbers, and perhaps `fp8`, are expected.
    """
    words = text.removesuffix(",fp8").split(",")
    if len(words) != 5 or not all(word.isdecimal() for word in words):
        raise InputError(f"--try {text!r}: expected five numbers such as 8,2,2,1,1, and perhaps fp8")
    return sm90.Tile(*map(int, words), Activations.E4M3 if text.endswith(",fp8") else Activations.NATIVE)


def add(new: sm90.Tile) -> None:
    """Add a tile to the table of costs, with those of the tile of as many tokens and the nearest number of rows.

    Raises:
        InputError: the table has no tile of as many tokens, with the same activations.
    """
    costs = cost.of(cost.DEFAULT)
    like = [known for known in costs if (known.tokens, known.activations) == (new.tokens, new.activations)]
    if not like:
        raise InputError(f"no tile of {new.tokens} tokens to predict {new} by")
    nearest = min(like, key=lambda known: abs(known.rows - new.rows))
    costs.setdefault(new, costs[nearest])


def main() -> None:
    """Read the command line, sweep, append rows to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT.csv")
    parser.add_argument("shapes", nargs="*", default=SHAPES, help="models or OCxIC")
    parser.add_argument("--n", required=True, help="numbers of tokens")
    parser.add_argument("--formats", default="fp6_e3m2", help="formats, separated by commas")
    parser.add_argument("--activations", default=Activations.NATIVE, choices=[one.value for one in Activations])
    parser.add_argument("--within", type=float, default=1.4, help="of the least predicted time; default: 1.4")
    parser.add_argument("--turns", type=int, default=2, help="times of each; default: 2")
    parser.add_argument("--try", dest="tiles", action="append", default=[], metavar="TILE", help="a tile to try")
    arguments = parser.parse_intermixed_args()
    try:
        tokens, shapes = numbers("--n", arguments.n), resolve(arguments.shapes)
        formats = schemes(arguments.formats.split(","), shapes)
        for text in arguments.tiles:
            add(tile(text))
    except TersorError as error:
        parser.error(str(error))
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("needs a GPU of compute capability 9.0")
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
