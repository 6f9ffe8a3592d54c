"""Time linears of two source trees in turn on one GPU: is a change faster?

    git worktree add ../before HEAD~1
    python bench/compare.py ../before/src src --n 1,16 --formats fp6_e3m2,int4:g128
    python bench/compare.py ../before/src src --n 128 --activations fp8 8192x8192

Every tree makes its own choices and compiles its own kernels, in a process of its own. They take turns, since a GPU
that has worked for a while is slower than one that has not: only times of one run compare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SHAPES = ("llama-2-70b", "llama-3-8b")
_CHILD = "TERSOR_COMPARE"
"""Set in the processes that time."""


def measured(
    shapes: Sequence[str], formats: Sequence[str], tokens: Sequence[int], activations: str
) -> dict[str, float]:
    """Return microseconds a call of the tersor that is imported, in chains with programmatic dependent launch."""
    import torch

    from tersor.bench import contenders, timing
    from tersor.bench.shapes import resolve
    from tersor.cli.bench import schemes

    sizes = resolve(shapes)
    found = {}
    for scheme in schemes(formats, sizes):
        for shape in sizes:
            weights = contenders.packed(scheme, shape.oc, shape.ic, torch.float16, activations)
            for index, n in enumerate(tokens):
                x = contenders.random(n, shape.ic, torch.float16)
                calls = contenders.chained(weights, x, early=True)
                if index == 0:
                    timing.graph_microseconds(calls, replays=2)  # clocks fell while weights were made
                name = f"{contenders.label(scheme, activations)} {shape.oc}x{shape.ic} N={n}"
                found[name] = timing.graph_microseconds(calls, replays=5)
    return found


def run(tree: Path, arguments: Sequence[str]) -> dict[str, float]:
    """Return what `measured` returns in a process that imports tersor from `tree`."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")]),
        _CHILD: "1",
    }
    command = [sys.executable, __file__, *arguments]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"{tree}: ended with status {child.returncode}")
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


def table(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> str:
    """Return every problem's times in both trees, a column a turn, and the ratio of their means."""
    turns = len(before)
    width = max(map(len, before[0]))
    lines = [f"{'':{width}}  {'before':<{9 * turns}}{'after':<{9 * turns}}after / before"]
    ratios = []
    for name in before[0]:
        times = [one[name] for one in (*before, *after)]
        ratios.append(statistics.mean(times[turns:]) / statistics.mean(times[:turns]))
        lines.append(f"{name:{width}}  {''.join(f'{time:<9.2f}' for time in times)}{ratios[-1]:.3f}")
    lines.append(f"{'geometric mean':{width}}  {'':{18 * turns}}{statistics.geometric_mean(ratios):.3f}")
    return "\n".join(lines)


def tokens(text: str) -> list[int]:
    """Read `1,16`; argparse says what is wrong with a word that is no number."""
    return [int(word) for word in text.split(",")]


def main() -> None:
    """Time both trees in turn, or in a child process the one that is imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a folder that holds the package tersor")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("shapes", nargs="*", default=SHAPES, help="models or OCxIC")
    parser.add_argument("--n", required=True, type=tokens, help="numbers of tokens")
    parser.add_argument("--formats", default="fp6_e3m2", help="formats, separated by commas")
    parser.add_argument("--activations", default="16bit", choices=("16bit", "fp8"))
    parser.add_argument("--turns", type=int, default=2, help="of each tree; default: 2")
    arguments = parser.parse_intermixed_args()
    if os.environ.get(_CHILD):
        formats = arguments.formats.split(",")
        print(json.dumps(measured(arguments.shapes, formats, arguments.n, arguments.activations), allow_nan=False))
        return
    trees = [tree.resolve() for tree in (arguments.before, arguments.after)]
    for tree in trees:
        if not (tree / "tersor" / "__init__.py").exists():
            parser.error(f"{tree} holds no package tersor")
    turns = [[run(tree, sys.argv[1:]) for tree in trees] for _ in range(arguments.turns)]
    print(table([pair[0] for pair in turns], [pair[1] for pair in turns]))


if __name__ == "__main__":
    main()
