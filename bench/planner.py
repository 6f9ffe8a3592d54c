"""What does a search of the planner take? Time against layers, options and devices, on any machine.

    python bench/planner.py
    python bench/planner.py --layers 8,80 --options 6 --devices 8 --episodes 400

The model is a made one: equal layers of ten blocks with two residual edges, an embedding and a head of their own. An
option that takes less memory takes more time, roughly, and to hand on between unlike options costs. Each problem is
searched tied (equal layers choose alike) and untied, without a limit of memory and with one that binds. For a number of
devices a block has an option to be replicated, and three for each power of two up to it; stages are cut in nodes of
eight. Numbers go to results/planner.json; plans themselves come from `tersor.planner`, whoever makes the problem.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import results_file

from tersor.cli.bench import numbers
from tersor.planner import search
from tersor.planner.problem import Block, Edge, Problem
from tersor.planner.search import Found
from tersor.planner.stages import Group, split

BLOCKS, LAYERS, OPTIONS, NODE = 10, 80, 6, 8
SKIPS = ((0, BLOCKS // 2), (BLOCKS // 2, BLOCKS - 1))


def model(layers: int, options: int, share: float | None, seed: int = 0) -> Problem:
    """Return a made model.

    Args:
        layers: equal, tied ones.
        options: of every block.
        share: of what lies between the least and the most memory, what a rank has; None is no limit.
        seed: of all numbers.
    """
    random = np.random.default_rng(seed)
    cuts = np.linspace(1, 8, options)

    def block(name: str, tie: str, weight: float, noise: npt.NDArray[np.float64]) -> Block:
        seconds = 1e-6 * weight * (0.3 + 0.6 * cuts / 8 + noise[0])
        taken = np.floor(1e6 * weight * (1 / cuts + noise[1]))[:, None]
        return Block(name, tuple(f"{cut:.1f}" for cut in cuts), seconds, taken[:, : share is not None], tie)

    def handed() -> npt.NDArray[np.float64]:
        return 1e-6 * random.uniform(1, 8, (options, options)) * (1 - np.eye(options))

    weights, noise = random.uniform(1, 30, BLOCKS), random.uniform(0, 0.15, (BLOCKS, 2, options))
    inner, skips, between = [handed() for _ in range(BLOCKS - 1)], [handed() for _ in SKIPS], handed()
    ends = random.uniform(0, 0.15, (2, 2, options))
    blocks, edges = [block("embed", "", 20.0, ends[0])], [Edge("embed", "0.0", handed())]
    for layer in range(layers):
        names = [f"{layer}.{place}" for place in range(BLOCKS)]
        blocks += [block(name, f"layer.{n}", weights[n], noise[n]) for n, name in enumerate(names)]
        edges += [Edge(names[n], names[n + 1], inner[n]) for n in range(BLOCKS - 1)]
        edges += [Edge(names[one], names[two], own) for (one, two), own in zip(SKIPS, skips, strict=True)]
        if layer:
            edges.append(Edge(f"{layer - 1}.{BLOCKS - 1}", names[0], between))
    blocks.append(block("head", "", 40.0, ends[1]))
    edges.append(Edge(f"{layers - 1}.{BLOCKS - 1}", "head", handed()))
    if share is None:
        return Problem(tuple(blocks), tuple(edges))
    least, most = (sum(float(pick(own.bytes)) for own in blocks) for pick in (np.min, np.max))
    return Problem(tuple(blocks), tuple(edges), (("memory of a rank", math.floor(least + share * (most - least))),))


def measured(run: Callable[[], Found]) -> dict[str, Any]:
    """Return what is kept of an answer: what a step takes, and what the search took by the clock and of a processor."""
    start = time.process_time()
    found = run()
    took = {"searched_s": found.searched, "processor_s": time.process_time() - start, "steps": found.steps}
    return {"ms": 1e3 * found.seconds, "gap": found.gap if math.isfinite(found.gap) else None, **took}


def compare(problem: Problem, with_full: bool, gap: float, seconds: float) -> dict[str, Any]:
    """Return what searches find and take: tied and untied, fast and full."""
    free = search.untied(problem)
    searches: dict[str, Callable[[], Found]] = {"fast, tied": lambda: search.fast(problem)}
    searches["fast, untied"] = lambda: search.fast(free)
    searches["near"] = lambda: search.near(problem)
    if with_full:
        searches["full, tied"] = lambda: search.full(problem, gap=gap, seconds=seconds)
        searches["full, untied"] = lambda: search.full(free, gap=gap, seconds=seconds)
        searches["HiGHS alone, untied"] = lambda: search.full(free, gap=gap, seconds=seconds, alone=True)
    return {name: measured(run) for name, run in searches.items()}


def staged(devices: int, layers: int) -> dict[str, Any]:
    """Return what it takes to cut layers into stages of one, two, four nodes and more, of so many devices."""
    nodes = max(1, devices // NODE)
    base = np.random.default_rng(0).uniform(1, 2, layers + 2)
    base[[0, -1]] *= 2
    sizes = [2**power for power in range(int(math.log2(nodes)) + 1)][:5]
    groups = [Group(f"{size} nodes", (size,), base / size**0.9, base / size) for size in sizes]
    start, processor = time.perf_counter(), time.process_time()
    found = split(groups, [nodes], np.full((len(sizes), len(sizes), layers + 2), 0.01))
    took = {"searched_s": time.perf_counter() - start, "processor_s": time.process_time() - processor}
    return {**took, "stages": len(found.stages), "cuts": found.cuts}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="1,8,80,160", help="default: 1,8,80,160")
    parser.add_argument("--options", default="3,6,12,24", help=f"of a block, of {LAYERS} layers")
    parser.add_argument("--devices", default="1,8,64,512,4096,16384", help="default: 1,8,64,512,4096,16384")
    parser.add_argument("--episodes", type=int, default=400, help="of the network; as many plans at random")
    parser.add_argument("--gap", type=float, default=1e-3, help="that the full search asks for; default: 0.001")
    parser.add_argument("--seconds", type=float, default=60.0, help="that it has; default: 60")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"blocks": BLOCKS, "layers": {}, "options": {}, "devices": {}, "learned": {}}

    def keep(part: str, key: str, found: dict[str, Any]) -> None:
        result[part][key] = found
        for name, one in found.items():
            shown = "  ".join(f"{what} {value:.5g}" for what, value in one.items() if value is not None)
            print(f"{part} {key:>14}  {name:22}{shown}", flush=True)

    shares = {"free": None, "binding": 0.3}
    for layers in numbers("--layers", arguments.layers):
        for name, share in shares.items():
            problem = model(layers, OPTIONS, share)
            keep("layers", f"{layers} {name}", compare(problem, layers <= LAYERS, arguments.gap, arguments.seconds))
    for options in numbers("--options", arguments.options):
        for name, share in shares.items():
            keep("options", f"{options} {name}", compare(model(LAYERS, options, share), False, 0.0, 0.0))
    for devices in numbers("--devices", arguments.devices):
        problem = model(LAYERS, 1 + 3 * int(math.log2(devices)), None)
        fast = measured(functools.partial(search.fast, problem))
        keep("devices", str(devices), {"fast, tied": fast, "stages": staged(devices, LAYERS)})
    for layers in numbers("--layers", arguments.layers):
        for name, share in shares.items():
            problem = model(layers, OPTIONS, share)
            each = {
                "fast, tied": functools.partial(search.fast, problem),
                "learned": functools.partial(search.learned, problem, episodes=arguments.episodes),
                "random": functools.partial(search.random, problem, count=arguments.episodes),
            }
            keep("learned", f"{layers} {name}", {key: measured(run) for key, run in each.items()})
    print(results_file.write("planner", result))


if __name__ == "__main__":
    main()
