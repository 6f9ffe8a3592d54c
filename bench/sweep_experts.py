"""Time every tile that may be the best for the experts of a layer, and say what the choice of tiles loses by that.

    python bench/sweep_experts.py OUT.csv --seconds 150
    python bench/sweep_experts.py --from OUT.csv
    python bench/sweep_experts.py --from OUT.csv --fit --leave-out

Both products of a layer are timed apart, each chained with itself by programmatic dependence over routings of its own,
with as many experts' weights as L2 does not hold. Rows are appended as they are found. The loss of a layer is the time
of the tiles that are predicted to be the fastest of those that were timed, over the least time of any two that have as
many tokens as each other. Where the chooser takes tiles that were not timed, it is said.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeAlias

import torch

from tersor import hardware
from tersor.bench import timing
from tersor.bench.experts.geometry import MODELS, Geometry
from tersor.compress import quantize_rtn
from tersor.formats import get_scheme
from tersor.hardware import CHIPS, Chip
from tersor.kernels import experts as family
from tersor.kernels import jit
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune import experts_sm90
from tersor.kernels.tune.experts_sm90 import Constants, Load
from tersor.kernels.tune.tile import Tile
from tersor.layouts import PackedWeight, StackedWeight
from tersor.layouts.packing import Packing
from tersor.ops import Gate, grouped, routing

NAMES = "qwen3-30b-a3b,gpt-oss-20b,mixtral-8x7b,olmoe"
TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"
FORMAT = "fp6_e3m2"
COLUMNS = ("model", "tokens", "product", "tile_tokens", "row_groups", "channel_groups", "resident", "microseconds")
WITHIN = 1.7
"""Tiles predicted to take up to so many times the least time are timed, fastest first."""
MOST = 7
L2_BYTES = 200 << 20
SOFTNESS, STEEPNESS, FIDELITY = 0.02, 8.0, 0.3
"""As in bench/costs.py: of a fit, how near predictions are undecided, what great losses cost, and what errors do."""
GENERATIONS = 150
Cell: TypeAlias = tuple[dict[Tile, float], dict[Tile, float]]
"""Microseconds of the tiles of the first product and of the second."""
Times: TypeAlias = dict[tuple[str, int], Cell]
"""(model, tokens) -> times."""


def problems(geometry: Geometry, tokens: int) -> tuple[tune.ExpertsProblem, tune.ExpertsProblem]:
    """Return what both products ask, with weights packed for float16."""
    packing = Packing.of(get_scheme(FORMAT), "float16")
    shapes = [(geometry.experts, shape.oc, shape.ic) for shape in geometry.linears()]
    up, down = (tune.ExpertsProblem.of(packing, shape, tokens, geometry.top_k) for shape in shapes)
    return up, down


def plausible(problem: tune.ExpertsProblem, first: bool, chip: Chip) -> list[Tile]:
    """Return the tiles that may be the best for a layer's first product or its second, the likeliest first."""
    times = {tile: tune.seconds(problem, tile, chip, first) for tile in tune.tiles(problem)}
    ranked = sorted(times, key=lambda tile: times[tile])
    return [tile for tile in ranked if times[tile] <= WITHIN * times[ranked[0]]][:MOST]


def random_weight(shape: tuple[int, int, int], device: torch.device) -> StackedWeight:
    """Return random codes of a layer's experts in kernel tiles, and the scales of one unit of rows for all."""
    experts, oc, ic = shape
    scheme = get_scheme(FORMAT)
    rows = torch.randn(64, ic, device=device) / math.sqrt(ic)
    unit = PackedWeight.from_encoded(quantize_rtn(rows, scheme)).to_layout("tiles_float16")
    units = -(-oc // 64)
    words = (experts, units * unit.data.numel())
    data = torch.randint(-(2**31), 2**31 - 1, words, dtype=torch.int32, device=device)
    scale = unit.scale.repeat(units).expand(experts, -1).contiguous()
    return StackedWeight(scheme, shape, data, scale, None, "tiles_float16")


def main() -> None:
    """Parse the command line; sweep and append rows, or judge rows that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="CSV to append to")
    parser.add_argument("--from", dest="source", type=Path, action="append", help="judge the rows of such files")
    parser.add_argument("--fit", action="store_true", help="find constants that lose less by --from; needs SciPy")
    parser.add_argument("--leave-out", action="store_true", help="and fit without each model, to judge that one")
    parser.add_argument("--models", default=NAMES)
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=150.0, help="no cell is begun after so many")
    arguments = parser.parse_args()
    if arguments.source:
        times = read(arguments.source)
        judge(times)
        if arguments.fit or arguments.leave_out:
            report_fit(times, arguments.leave_out)
        return
    if arguments.output is None:
        parser.error("say where the rows go, or --from which file they come")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("sweep_experts.py: needs a GPU of compute capability 9.0")
    tokens = [int(count) for count in arguments.tokens.split(",")]
    sweep(arguments.output, arguments.models.split(","), tokens, arguments.seconds)


def sweep(output: Path, models: list[str], tokens: list[int], seconds: float) -> None:
    """Time the plausible tiles of every cell."""
    chip, device, started = hardware.of_device(0), torch.device("cuda", 0), time.perf_counter()
    fresh = not output.exists()
    with output.open("a", newline="") as file:
        rows = csv.writer(file)
        if fresh:
            rows.writerow(COLUMNS)
        for model in models:
            geometry = MODELS[model]
            pair = [random_weight((geometry.experts, shape.oc, shape.ic), device) for shape in geometry.linears()]
            cells = [(count, problem) for count in tokens for problem in enumerate(problems(geometry, count))]
            sources = [
                family.source(pair[at].packing, "float16", tune.config(problem, tile, chip), gate(at), bool(at))
                for _, (at, problem) in cells
                for tile in plausible(problem, at == 0, chip)
            ]
            jit.compile_many(sources, jit.arch_for(chip.capability))
            for count, (at, problem) in cells:
                if time.perf_counter() - started > seconds:
                    print(f"{seconds:.0f} s are over: {model} from {count} tokens on is not timed")
                    return
                for tile in plausible(problem, at == 0, chip):
                    took = timed(geometry, problem, pair[at], at, tile, chip)
                    sizes = (tile.tokens, tile.row_groups, tile.channel_groups, tile.resident)
                    rows.writerow((model, count, ("up", "down")[at], *sizes, f"{took:.3f}"))
                file.flush()


def gate(at: int) -> int:
    """Return EPILOGUE of the first product or the second."""
    return 0 if at else int(Gate.SILU)


def timed(
    geometry: Geometry, problem: tune.ExpertsProblem, weight: StackedWeight, at: int, tile: Tile, chip: Chip
) -> float:
    """Return the microseconds of one launch of a product with a tile."""
    config = tune.config(problem, tile, chip)
    product = grouped.product_of(weight, config, gate(at), problem.tokens, problem.top_k, torch.float16, 0, bool(at))
    pairs, (_, oc, ic) = problem.tokens * problem.top_k, weight.shape
    hit = min(pairs, geometry.experts) * weight.nbytes / geometry.experts
    copies = max(3, min(24, math.ceil(L2_BYTES / hit)))
    x = torch.randn(pairs + tile.tokens, ic, dtype=torch.float16, device=weight.data.device) / 8
    y = x.new_empty(pairs + tile.tokens, oc)
    generator = torch.Generator(x.device).manual_seed(0)
    calls = []
    for _ in range(copies):
        scores = torch.rand(problem.tokens, geometry.experts, device=x.device, generator=generator)
        index = scores.topk(geometry.top_k).indices
        tables = routing.tables(index, geometry.experts, tile.tokens)
        calls.append(functools.partial(grouped.run, product, weight, None, x.data_ptr(), ic, 0, tables, y))
    return timing.graph_microseconds(calls, replays=5)


def read(sources: Iterable[Path]) -> Times:
    """Read sweeps."""
    times: Times = {}
    for source in sources:
        with source.open(newline="") as file:
            for row in csv.DictReader(file):
                sizes = [int(row[name]) for name in ("tile_tokens", "row_groups", "channel_groups")]
                tile = Tile(*sizes, 1, int(row["resident"]))
                cell = times.setdefault((row["model"], int(row["tokens"])), ({}, {}))
                cell[row["product"] == "down"][tile] = float(row["microseconds"])
    return times


def loss(
    model: str, tokens: int, timed: Cell, chip: Chip = CHIPS["NVIDIA H200"]
) -> tuple[float, tuple[Tile, Tile], tuple[Tile, Tile]]:
    """Return what the choice among the timed tiles loses, a share of the least time; that choice, and the best one."""
    choice = tune.least_pair(*problems(MODELS[model], tokens), *timed, chip)
    pairs = [(up, down) for up in timed[0] for down in timed[1] if up.tokens == down.tokens]
    took = {(up, down): timed[0][up] + timed[1][down] for up, down in pairs}
    best = min(took, key=lambda pair: took[pair])
    return took[choice] / took[best] - 1, choice, best


def judge(times: Times, chip: Chip = CHIPS["NVIDIA H200"]) -> None:
    """Print what the chooser loses in each cell, and over all."""
    losses = []
    for (model, tokens), timed in times.items():
        lost, choice, best = loss(model, tokens, timed, chip)
        losses.append(lost)
        said, least = (
            ", ".join(f"{_said(tile)} {timed[at][tile]:.1f}" for at, tile in enumerate(pair)) for pair in (choice, best)
        )
        print(f"{model:16} {tokens:6} {said:37} best {least:37} loss {100 * lost:5.1f} %")
        taken = tuple(config.tile for config in tune.choose_pair(*problems(MODELS[model], tokens), chip))
        if taken != choice:
            print(f"{'':23} takes {', '.join(map(_said, taken))}, which were not timed")
    print(f"mean loss {100 * statistics.mean(losses):.1f} %, worst {100 * max(losses):.1f} %")


def fit(times: Times, chip: Chip = CHIPS["NVIDIA H200"], seed: int = 0) -> Constants:
    """Return constants with which the choice among the timed tiles loses little.

    Differential evolution (Storn and Price, 1997) from the present ones. What is made small is the mean over all cells
    of the loss, of which a great one counts more than several that add up to it, and `FIDELITY` times the error of all
    predictions. A choice is undecided between pairs of tiles that are predicted to be nearly as fast as each other.
    """
    import numpy as np
    from scipy.optimize import differential_evolution

    loads, measured, choices = [], [], []
    for (model, tokens), timed in times.items():
        places: tuple[dict[Tile, int], dict[Tile, int]] = ({}, {})
        for at, problem in enumerate(problems(MODELS[model], tokens)):
            for tile, took in timed[at].items():
                places[at][tile] = len(loads)
                loads.append(experts_sm90.load(problem, tile, chip, at == 0))
                measured.append(took)
        pairs = [(places[0][up], places[1][down]) for up in timed[0] for down in timed[1] if up.tokens == down.tokens]
        choices.append(np.array(pairs).T)
    all_loads, took = Load(*np.array(loads).T), np.array(measured)
    ordering = [tune.ORDERING * (all_loads.rows[ups] == 0) for ups, _ in choices]

    def goal(values: Sequence[float]) -> float:
        predicted, total = experts_sm90.microseconds(all_loads, Constants(*values)), 0.0
        for (ups, downs), ordered in zip(choices, ordering, strict=True):
            of_pairs, sums = np.log(predicted[ups] + predicted[downs] + ordered), took[ups] + took[downs]
            weights = np.exp((of_pairs.min() - of_pairs) / SOFTNESS)
            lost = (weights * sums).sum() / weights.sum() / sums.min() - 1
            total += lost + STEEPNESS * lost**2
        return total / len(choices) + FIDELITY * float(np.abs(np.log(predicted / took)).mean())

    now = astuple(experts_sm90.CONSTANTS)
    found = differential_evolution(
        goal,
        [(value / 2, value * 2) for value in now],
        x0=now,
        maxiter=GENERATIONS,
        popsize=8,
        seed=seed,
        polish=False,
        tol=1e-5,
    )
    return Constants(*(float(f"{value:.3g}") for value in found.x))


def report_fit(times: Times, leave_out: bool) -> None:
    """Print fitted constants and what is lost with them, and likewise in each model by a fit to the others."""
    for left in [None, *dict.fromkeys(model for model, _ in times)] if leave_out else [None]:
        constants = fit({cell: timed for cell, timed in times.items() if cell[0] != left})
        before, experts_sm90.CONSTANTS = experts_sm90.CONSTANTS, constants
        judged = [loss(*cell, timed)[0] for cell, timed in times.items() if left in (None, cell[0])]
        experts_sm90.CONSTANTS = before
        of = f"in {left}, fitted to the others" if left else f"with {constants}"
        print(f"mean loss {100 * statistics.mean(judged):.2f} %, worst {100 * max(judged):.1f} % {of}")


def _said(tile: Any) -> str:
    return f"{tile.rows}x{tile.tokens}k{tile.channel_groups}r{tile.resident}"


if __name__ == "__main__":
    main()
