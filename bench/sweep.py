"""Time every configuration that may be the best of a problem, on a GPU of compute capability 9.0, for `bench/costs.py`.

    python bench/sweep.py OUT.csv --seconds 330
    python bench/sweep.py OUT.csv --n 128,256 --activations fp8 --within 1.3 llama-3-8b 5120x5120

Of every cell (weight, activations, number of tokens) the configurations predicted to be fastest are timed first, the
best of each tile before any tile's second, in rounds over all cells in random order: a sweep that is cut off knows
something of each. Those of one cell follow one another: a GPU that has worked hard for a while is slower than one that
has not, by more than the best differ; of large products the first is timed twice, and the second time counts. Then what
came near the best of its cell is timed again. Launches are chained with programmatic dependence. Rows are appended as
they are found, so that several runs may share a file. A configuration that fails is named, and ends the sweep where the
GPU fails with it.

`--try` adds tiles that the table of costs does not have, such as 8,2,2,1,1 (tokens, row groups, channel groups,
cluster, resident CTAs) or 64,2,1,2,1,fp8; they are predicted by the costs of a tile like them.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

import torch

from tersor import hardware
from tersor.bench import contenders, linear, timing, tune
from tersor.bench.shapes import Shape, resolve
from tersor.cli.bench import activations, numbers, schemes
from tersor.errors import InputError, TersorError
from tersor.formats import Activations, Scheme
from tersor.hardware import Chip
from tersor.kernels import dense, jit, quantizing
from tersor.kernels.tune import SM90, LinearConfig, LinearProblem, cost, seconds, sm90
from tersor.layouts.packing import Packing

SHAPES = (
    *("1280x8192", "1024x16384", "2560x9728", "6144x4096", "4096x14336", "8192x3584", "10240x8192", "28672x4096"),
)
TOKENS = "24,48,64,80,96,112,128,144,160,176,200,224,240,256,288,333,384,450,512,700,1000,1500,3000"
COLUMNS = (
    *("oc", "ic", "format", "activations", "n", "tokens", "row_groups", "channel_groups", "cluster", "resident"),
    *("whole_tiles", "splits", "gathered", "microseconds"),
)
ROUND = 8
"""Configurations of a cell that are timed before any other cell has more."""
NEAR = 1.05
"""What took up to so many times the least time of its cell is timed again."""
RESTED = 120.0
"""From so many microseconds on the first of a cell's turn finds a GPU that has rested, and is 5 % faster than later."""


class Cell(NamedTuple):
    """One weight, multiplied in one way with one number of tokens."""

    shape: Shape
    scheme: Scheme
    activations: Activations
    n: int

    @property
    def problem(self) -> LinearProblem:
        """What the model is asked."""
        return linear.problem_of(self.shape, self.scheme, self.n, self.activations)


Timed = Callable[[Cell, LinearConfig], float]
"""Times a configuration of a cell, in microseconds a launch."""


def plausible(problem: LinearProblem, chip: Chip, within: float) -> list[LinearConfig]:
    """Return the configurations of the sm90 schedule predicted to take up to `within` times the least time, fastest
    first."""
    times = {
        config: seconds(problem, config, chip)
        for config in tune.worth_measuring(problem, chip)
        if config.schedule == SM90
    }
    return sorted((one for one, time in times.items() if time <= within * min(times.values())), key=times.__getitem__)


def ranked(configs: Iterable[LinearConfig]) -> list[LinearConfig]:
    """Return the best of every tile first, then every tile's second, and so on; otherwise as they come."""
    seen: Counter[sm90.Tile] = Counter()
    ranks = {}
    for config in configs:
        tile = sm90.tile_of(config)
        ranks[config] = seen[tile]
        seen[tile] += 1
    return sorted(ranks, key=ranks.__getitem__)


def row(shape: Shape, scheme: Scheme, activations: str, n: int, config: LinearConfig, microseconds: float) -> list[str]:
    """Return what `bench/costs.py` reads of one time, in the order of COLUMNS."""
    *sizes, _ = astuple(sm90.tile_of(config))
    splitting = (config.whole_tiles, config.splits, int(config.gathered), f"{microseconds:.2f}")
    return [str(value) for value in (shape.oc, shape.ic, contenders.label(scheme), activations, n, *sizes, *splitting)]


def sweep(
    wanted: Mapping[Cell, Sequence[LinearConfig]], timed: Timed, going: Callable[[], bool], turns: int
) -> Iterator[tuple[Cell, LinearConfig, float]]:
    """Time configurations round by round while `going`, then up to `turns` times in all those near the best.

    Args:
        wanted: cell -> its configurations, the most promising first.
        timed: times one of them.
        going: whether there is time left.
        turns: how often a configuration is timed at most.
    """
    shuffled, found = random.Random(0), dict[Cell, dict[LinearConfig, float]]()
    longest = max(map(len, wanted.values()), default=0)

    def rounds() -> Iterator[dict[Cell, list[LinearConfig]]]:
        for first in range(0, longest, ROUND):
            yield {cell: list(configs[first : first + ROUND]) for cell, configs in wanted.items()}
        for _ in range(1, turns):
            near: dict[Cell, list[LinearConfig]] = {}
            for cell, times in found.items():
                near[cell] = [config for config, time in times.items() if time <= NEAR * min(times.values())]
            yield near

    for jobs in rounds():
        cells = list(jobs)
        shuffled.shuffle(cells)
        for cell in cells:
            shuffled.shuffle(jobs[cell])
            for place, config in enumerate(jobs[cell]):
                if not going():
                    return
                microseconds = timed(cell, config)
                if place == 0 and microseconds >= RESTED:
                    microseconds = timed(cell, config)
                if microseconds > 0:
                    times = found.setdefault(cell, {})
                    times[config] = min(microseconds, times.get(config, microseconds))
                    yield cell, config, microseconds


def on_gpu(dtype: torch.dtype = torch.float16) -> Timed:
    """Return what times on the current GPU; it keeps the copies of every weight that it was asked about."""

    @functools.cache
    def weights(shape: Shape, scheme: Scheme, kind: Activations) -> list[object]:
        return list(contenders.packed(scheme, shape.oc, shape.ic, dtype, kind))

    @functools.lru_cache(maxsize=64)
    def tokens(n: int, ic: int) -> torch.Tensor:
        return contenders.random(n, ic, dtype)

    def timed(cell: Cell, config: LinearConfig) -> float:
        copies, x = weights(cell.shape, cell.scheme, cell.activations), tokens(cell.n, cell.shape.ic)
        calls = contenders.chained(copies, x, early=True, config=config)  # type: ignore[arg-type]
        return timing.graph_microseconds(calls, tune.REPLAYS)

    return timed


def guarded(timed: Timed, report: Callable[[str], None], alive: Callable[[], object]) -> Timed:
    """Return what times, or reports a configuration that fails and returns 0; `alive` raises where the GPU failed."""

    def checked(cell: Cell, config: LinearConfig) -> float:
        try:
            return timed(cell, config)
        except (RuntimeError, TersorError) as error:
            report(f"failed: {cell.shape} N={cell.n} {cell.activations}, {config}: {' '.join(str(error).split())}")
            alive()
            return 0.0

    return checked


def sources(wanted: Mapping[Cell, Sequence[LinearConfig]], result: str = "float16") -> list[jit.KernelSource]:
    """Return the kernels of all configurations, and what quantises activations, each once."""
    found = []
    for cell, configs in wanted.items():
        packing = Packing.beside(cell.activations, torch.float16, cell.scheme)
        found += [dense.fused_source(packing, result, config) for config in configs]
        if cell.activations is not Activations.NATIVE:
            found.append(quantizing.quantize_source(result, cell.activations))
    return list(dict.fromkeys(found))


def tile(text: str) -> sm90.Tile:
    """Read a tile such as `8,2,2,1,1` or `64,2,1,2,1,fp8`.

    Raises:
        InputError: five numbers, and perhaps `fp8` or `int8`, are expected.
    """
    *words, last = text.split(",")
    kind = {"fp8": Activations.E4M3, "int8": Activations.INT8}.get(last, Activations.NATIVE)
    if kind is Activations.NATIVE:
        words.append(last)
    if len(words) != 5 or not all(word.isdecimal() for word in words):
        raise InputError(f"--try {text!r}: expected five numbers such as 8,2,2,1,1, and perhaps fp8 or int8")
    return sm90.Tile(*map(int, words), kind)


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


def parsed(text: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[Cell]]:
    """Read the command line; return it and the cells that it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT.csv")
    parser.add_argument("shapes", nargs="*", default=SHAPES, help="models or OCxIC")
    parser.add_argument("--n", default=TOKENS, help=f"numbers of tokens; default: {TOKENS}")
    parser.add_argument("--formats", default="fp6_e3m2", help="formats, separated by commas")
    parser.add_argument("--activations", default="16bit,fp8", help="16bit, fp8, int8, or several; default: 16bit,fp8")
    parser.add_argument("--within", type=float, default=1.6, help="of the least predicted time; default: 1.6")
    parser.add_argument("--most", type=int, default=16, help="configurations of a cell; default: 16")
    parser.add_argument("--turns", type=int, default=2, help="times of what is near the best; default: 2")
    parser.add_argument("--seconds", type=float, help="stop after so many, compiling included")
    parser.add_argument("--try", dest="tiles", action="append", default=[], metavar="TILE", help="a tile to try")
    arguments = parser.parse_intermixed_args(text)
    try:
        tokens, shapes = numbers("--n", arguments.n), resolve(arguments.shapes)
        formats, kinds = schemes(arguments.formats.split(","), shapes), activations(arguments.activations)
        for one in arguments.tiles:
            add(tile(one))
        cells = [
            Cell(shape, scheme, kind, n) for shape in shapes for scheme in formats for kind in kinds for n in tokens
        ]
        for cell in cells:
            _ = cell.problem  # raises where the format has no kernel beside such activations
    except TersorError as error:
        parser.error(str(error))
    return arguments, cells


def main() -> None:
    """Read the command line, sweep, append rows to the file."""
    start = time.monotonic()
    arguments, cells = parsed()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("sweep.py: needs a GPU of compute capability 9.0")
    chip = hardware.of_device(torch.cuda.current_device())
    wanted = {cell: ranked(plausible(cell.problem, chip, arguments.within))[: arguments.most] for cell in cells}
    jobs, kernels = sum(map(len, wanted.values())), sources(wanted)
    jit.compile_many(kernels, jit.arch_for(chip.capability), os.cpu_count())
    ready = time.monotonic() - start
    print(f"{len(cells)} cells, {jobs} configurations, {len(kernels)} kernels, {ready:.0f} s to build", file=sys.stderr)
    failures: list[str] = []

    def report(message: str) -> None:
        failures.append(message)
        print(message, file=sys.stderr, flush=True)

    def going() -> bool:
        return arguments.seconds is None or time.monotonic() - start < arguments.seconds

    timed = guarded(on_gpu(), report, torch.cuda.synchronize)
    is_new, count = not arguments.output.exists(), 0
    with arguments.output.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for cell, config, microseconds in sweep(wanted, timed, going, arguments.turns):
            writer.writerow(row(cell.shape, cell.scheme, cell.activations, cell.n, config, microseconds))
            file.flush()
            count += 1
    print(f"{count} times in {time.monotonic() - start:.0f} s, {len(failures)} failed", file=sys.stderr)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
