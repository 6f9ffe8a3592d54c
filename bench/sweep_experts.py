"""Time every tile that may be the best for the experts of a layer, and say what the choice of tiles loses by that.

    python bench/sweep_experts.py OUT.csv --seconds 150
    python bench/sweep_experts.py --from OUT.csv

Both products of a layer are timed apart, each chained with itself by programmatic dependence over routings of its own,
with as many experts' weights as L2 does not hold. Rows are appended as they are found. The loss of a layer is the time
of the tiles that `tune.choose_pair` takes over the least time of any two that have as many tokens as each other.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

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


def problems(geometry: Geometry, tokens: int) -> tuple[tune.ExpertsProblem, tune.ExpertsProblem]:
    """Return what both products ask, with weights packed for float16."""
    packing = Packing.of(get_scheme(FORMAT), "float16")
    shapes = [(geometry.experts, shape.oc, shape.ic) for shape in geometry.linears()]
    up, down = (tune.ExpertsProblem.of(packing, shape, tokens, geometry.top_k) for shape in shapes)
    return up, down


def plausible(problem: tune.ExpertsProblem, chip: Chip) -> list[Tile]:
    """Return the tiles that may be the best, the one predicted to be it first."""
    times = {tile: tune.seconds(problem, tile, chip) for tile in tune.tiles(problem)}
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
    parser.add_argument("--models", default=NAMES)
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--seconds", type=float, default=150.0, help="no cell is begun after so many")
    arguments = parser.parse_args()
    if arguments.source:
        judge(arguments.source)
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
                for tile in plausible(problem, chip)
            ]
            jit.compile_many(sources, jit.arch_for(chip.capability))
            for count, (at, problem) in cells:
                if time.perf_counter() - started > seconds:
                    print(f"{seconds:.0f} s are over: {model} from {count} tokens on is not timed")
                    return
                for tile in plausible(problem, chip):
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


def judge(sources: list[Path]) -> None:
    """Print what the chooser loses in each cell, and over all."""
    times: dict[tuple[str, int], dict[tuple[str, Tile], float]] = defaultdict(dict)
    for source in sources:
        with source.open(newline="") as file:
            for row in csv.DictReader(file):
                sizes = [int(row[name]) for name in ("tile_tokens", "row_groups", "channel_groups")]
                tile = Tile(*sizes, 1, int(row["resident"]))
                times[row["model"], int(row["tokens"])][row["product"], tile] = float(row["microseconds"])
    chip, losses = CHIPS["NVIDIA H200"], []
    for (model, tokens), found in times.items():
        configs = tune.choose_pair(*problems(MODELS[model], tokens), chip)
        chosen = [found.get((product, config.tile)) for product, config in zip(("up", "down"), configs, strict=True)]
        widths = {tile.tokens for _, tile in found}
        sums = {width: [_least(found, product, width) for product in ("up", "down")] for width in widths}
        best = min(sums, key=lambda width: sum(sums[width]))
        if None in chosen:
            print(f"{model:16} {tokens:6} chose a tile that was not timed: {_said(configs[0].tile)}")
            continue
        loss = sum(time for time in chosen if time is not None) / sum(sums[best]) - 1
        losses.append(loss)
        tiles = ", ".join(f"{_said(config.tile)} {took:.1f}" for config, took in zip(configs, chosen, strict=True))
        print(f"{model:16} {tokens:6} {tiles:40} best width {best}: {sum(sums[best]):.1f} us  loss {100 * loss:5.1f} %")
    if losses:
        print(f"mean loss {100 * statistics.mean(losses):.1f} %, worst {100 * max(losses):.1f} %")


def _least(found: dict[tuple[str, Tile], float], product: str, width: int) -> float:
    return min((took for (of, tile), took in found.items() if of == product and tile.tokens == width), default=math.inf)


def _said(tile: Any) -> str:
    return f"{tile.rows}x{tile.tokens}k{tile.channel_groups}r{tile.resident}"


if __name__ == "__main__":
    main()
