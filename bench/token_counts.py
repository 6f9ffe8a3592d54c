"""Does the time of a linear fit the number of tokens? Every multiple of 8 up to 512 and random numbers up to 4096.

    python bench/token_counts.py --against cublas,fp8 --output times.csv
    python bench/token_counts.py --from times.csv
    python bench/token_counts.py --against humming --n 8,24,40,72,136,264,392,1000,2500 12288x4096

Tersor with 16-bit and with 8-bit activations is timed beside its rivals in one run, and compared with these targets:

    rising   no number of tokens takes more than 1.03 times as long as any larger one
    cublas   16-bit and 8-bit activations take at most as long as cuBLAS in 16 bits
    humming  and at most as long as humming with the same activations
    fp8      8-bit activations take at most 1.15 times as long as torch._scaled_mm, whose input is quantised, from 64
             tokens and 50 million weights on

A chip that has just worked near its power limit is up to 20 % slower for a while, so numbers of tokens are timed in
ascending order and once more in descending order, and the lesser time counts. What was measured is printed, then the
misses, worst first. Half of the shapes were never swept (bench/sweep.py). humming compiles a kernel for every few
numbers of tokens, in seconds each.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from tersor import hardware, ops
from tersor.bench import contenders, timing
from tersor.bench.contenders import CUBLAS, FP8, HUMMING, PDL, Contender, Schedule, UnfitError, unlabelled
from tersor.bench.shapes import Shape, resolve
from tersor.cli.bench import activations, numbers, schemes
from tersor.errors import TersorError
from tersor.formats import Activations
from tersor.kernels import jit

KNOWN = ("10240x8192", "8192x8192", "57344x8192", "8192x28672", "6144x4096", "4096x4096", "28672x4096", "4096x14336")
"""Of the README's table of measured times."""
NEW = (
    *("7168x7168", "12288x4096", "4096x11008", "4608x9216", "3072x8192", "16384x3072", "2048x16384", "1536x12288"),
    *("18432x7168", "25600x5120"),
)
GRID, FURTHEST = 512, 4096
COLUMNS = ("oc", "ic", "n", "kernel", "microseconds")
LEAST_WEIGHTS = 16_000_000

Times: TypeAlias = dict[tuple[Shape, int], dict[str, float]]
"""(weight, tokens) -> kernel -> microseconds."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How one cell stands to a target.

    Attributes:
        target: `rising`, `cublas`, `humming` or `fp8`.
        shape, n, kernel: whose time.
        against: the larger number of tokens for `rising`, else the rival.
        ratio, limit: of the times, and what it may be.
    """

    target: str
    shape: Shape
    n: int
    kernel: str
    against: str
    ratio: float
    limit: float

    @property
    def excess(self) -> float:
        """By how many times the limit is missed; up to 1 it is kept."""
        return self.ratio / self.limit

    def __str__(self) -> str:
        return (
            f"{self.target:8} {self.ratio:5.2f} (may be {self.limit:.2f})  {self.shape} N={self.n} "
            f"{self.kernel} against {self.against}"
        )


def counts(step: int, more: int, seed: int = 0) -> list[int]:
    """Return the multiples of `step` up to GRID and `more` random numbers up to FURTHEST, ascending."""
    drawn = random.Random(seed).sample(range(1, FURTHEST + 1), more)
    return sorted({*range(step, GRID + 1, step), *drawn})


def ratios(times: Times) -> list[Ratio]:
    """Return how every cell of Tersor stands to every target that it was measured for."""
    found = []
    by_kernel: dict[tuple[Shape, str], dict[int, float]] = defaultdict(dict)
    for (shape, n), of_cell in times.items():
        for kernel, microseconds in of_cell.items():
            if kernel in (CUBLAS, FP8) or kernel.startswith(HUMMING) or shape.oc * shape.ic < LEAST_WEIGHTS:
                continue
            by_kernel[shape, kernel][n] = microseconds
            rivals = [(CUBLAS, CUBLAS, 1.0), (HUMMING, f"{HUMMING} {kernel}", 1.0)]
            if unlabelled(kernel)[1] is not Activations.NATIVE and n >= 64 and shape.oc * shape.ic >= 50_000_000:
                rivals.append((FP8, FP8, 1.15))
            for target, rival, limit in rivals:
                if rival in of_cell:
                    found.append(Ratio(target, shape, n, kernel, rival, microseconds / of_cell[rival], limit))
    for (shape, kernel), of_n in by_kernel.items():
        least, place = float("inf"), 0
        for n in sorted(of_n, reverse=True):
            if place:
                found.append(Ratio("rising", shape, n, kernel, f"N={place}", of_n[n] / least, 1.03))
            if of_n[n] < least:
                least, place = of_n[n], n
    return found


def missed(found: Iterable[Ratio]) -> list[Ratio]:
    """Return those that miss their target, the worst first."""
    return sorted((one for one in found if one.excess > 1), key=lambda one: -one.excess)


def measure(
    shape: Shape,
    tokens: Sequence[int],
    rivals: Sequence[Contender],
    microseconds: Callable[[contenders.Calls], float],
    say: Callable[[str], None] = print,
) -> Times:
    """Time all contenders at one shape and each number of tokens, up and down; return the lesser times.

    Args:
        shape: the weight.
        tokens: numbers of tokens.
        rivals: who is timed, Tersor among them.
        microseconds: times a graph of calls.
        say: told who does not take the shape or a number of tokens.
    """
    built: dict[str, Schedule] = {}
    for one in rivals:
        try:
            built[one.name] = one.build(shape.oc, shape.ic)
        except UnfitError as error:
            say(f"{shape}: {one.name} is not timed: {error}")
    chains = {one.name: one.chains[0] for one in rivals}
    times: Times = {(shape, n): {} for n in tokens}
    unfit: set[tuple[str, int]] = set()
    ascending = sorted(tokens)
    for n in (*ascending[:1], *ascending, *reversed(ascending)):  # the first twice: clocks fell while weights were made
        for name, schedule in built.items():
            if (name, n) in unfit:
                continue
            try:
                took = microseconds(schedule(n, chains[name]))
            except UnfitError as error:
                unfit.add((name, n))
                say(f"{shape} N={n}: {name} is not timed: {error}")
                continue
            times[shape, n][name] = min(took, times[shape, n].get(name, took))
    return times


def summary(times: Times) -> str:
    """Return what was measured, how every target fares, and the misses."""
    shapes = list(dict.fromkeys(shape for shape, _ in times))
    lines = [f"{shape}: {sum(at == shape for at, _ in times)} numbers of tokens" for shape in shapes]
    found = ratios(times)
    for target in ("rising", CUBLAS, HUMMING, FP8):
        for kernel in dict.fromkeys(one.kernel for one in found):
            own = [one for one in found if (one.target, one.kernel) == (target, kernel)]
            if own:
                mean = statistics.geometric_mean(one.ratio for one in own)
                lines.append(
                    f"{target:8} {kernel}: {len(missed(own))} of {len(own)} cells miss {own[0].limit:.2f}; "
                    f"ratio {mean:.3f} on average, worst {max(one.ratio for one in own):.2f}"
                )
    return "\n".join([*lines, *map(str, missed(found))])


def append(path: Path, times: Times) -> None:
    """Append times to a CSV file, a line a kernel of a cell, with a heading where it is new."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        lines = csv.writer(file)
        if fresh:
            lines.writerow(COLUMNS)
        for (shape, n), of_cell in times.items():
            for kernel, microseconds in of_cell.items():
                lines.writerow((shape.oc, shape.ic, n, kernel, f"{microseconds:.2f}"))


def read(path: Path) -> Times:
    """Return the times of a file that `append` wrote."""
    times: Times = defaultdict(dict)
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            cell = Shape(int(line["oc"]), int(line["ic"])), int(line["n"])
            times[cell][line["kernel"]] = float(line["microseconds"])
    return times


def main() -> None:
    """Time the shapes, print how the targets fare, write the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=[*NEW, *KNOWN], help="models or OCxIC")
    parser.add_argument("--step", type=int, default=8, help=f"of the numbers up to {GRID}; default: 8")
    parser.add_argument("--random", type=int, default=40, help=f"numbers up to {FURTHEST}; default: 40")
    parser.add_argument("--n", help="these numbers of tokens instead")
    parser.add_argument("--format", default="fp6_e3m2", help="default: fp6_e3m2")
    parser.add_argument("--activations", default="16bit,fp8", help="16bit, fp8, or both; default: both")
    parser.add_argument("--against", help="cublas, fp8, humming or none; default: all that are installed")
    parser.add_argument("--output", type=Path, help="CSV file to append the times to", metavar="FILE.csv")
    parser.add_argument("--from", dest="source", type=Path, help="time nothing: judge such a file", metavar="FILE.csv")
    arguments = parser.parse_intermixed_args()
    if arguments.source:
        print(summary(read(arguments.source)))
        return
    try:
        shapes = resolve(arguments.shapes)
        formats, kinds = schemes([arguments.format], shapes), activations(arguments.activations)
        against = contenders.parse_rivals(arguments.against)
        tokens = numbers("--n", arguments.n) if arguments.n else counts(arguments.step, arguments.random)
    except TersorError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("timing needs a CUDA device")
    chip = hardware.of_device(torch.cuda.current_device())
    kernels = {one for kind in kinds for one in ops.kernels_for(formats[0], torch.float16, chip, kind)}
    jit.compile_many(list(kernels), jit.arch_for(chip.capability))
    rivals = contenders.contenders(formats, torch.float16, (PDL,), against, kinds)
    times: Times = {}
    for shape in shapes:
        times |= (found := measure(shape, tokens, rivals, timing.graph_microseconds))
        torch.cuda.empty_cache()
        if arguments.output:
            append(arguments.output, found)
    print(summary(times))


if __name__ == "__main__":
    main()
