"""Time the ways in which one launch multiplies with a mixed weight, beside a launch a row set and beside cuBLAS.

    python bench/mixed.py OUT.csv 4096x4096 --format uint4:g128=90+int8=10 --activations int8 --n 16,128,512,2048
    python bench/mixed.py OUT.csv 14336x4096 --format fp4_e2m1=25+fp5_e2m2=25+fp6_e2m3=25+int8=25 --n 1,8,16

Of every cell (weight, mix, number of tokens) a row is written for each configuration that is worth a prediction, with
the time predicted and the one that Tersor chooses marked, one for a launch a row set (`apart`), one for a uniform one
(`--beside`, such as fp6_e2m3), which counts by its bytes, and one for cuBLAS. Launches are chained with programmatic
dependence.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tersor import hardware, ops
from tersor.bench import contenders, linear, timing
from tersor.bench.blend import Blend
from tersor.bench.shapes import Shape, resolve
from tersor.cli import bench
from tersor.formats import Activations
from tersor.kernels.tune import mixed
from tersor.layouts import MixedWeight
from tersor.ops import mixed as mixed_ops

FIELDS = ("weight", "n", "kernel", "chosen", "predicted", "microseconds", "config")


def main() -> None:
    """Time every cell and append what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--format", required=True, help="a mix, such as uint4:g128=90+int8=10")
    parser.add_argument("--in-order", action="store_true", help="rows stand in the order of their levels")
    parser.add_argument("--activations", default="16bit")
    parser.add_argument("--n", default="1,16,32,128,512,2048")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--beside", help="a uniform format to compare with")
    parser.add_argument(
        "--within", type=float, default=1.5, help="configurations predicted to take so much of the least"
    )
    options = parser.parse_args()
    shapes = resolve(options.shapes)
    (blend,) = bench.blends([options.format], shapes, options.in_order)
    if not isinstance(blend, Blend):
        sys.exit(f"{options.format} is no mix")
    (activations,), dtype = bench.activations(options.activations), bench.dtype_named(options.dtype)
    beside = bench.schemes([options.beside], shapes)[0] if options.beside else None
    with options.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        if not file.tell():
            table.writeheader()
        for shape in shapes:
            for n in bench.numbers("--n", options.n):
                rows = list(_cell(shape, blend, n, activations, dtype, options.within))
                if beside is not None:
                    time = _uniform(beside, shape, n, dtype, activations)
                    rows.append(_row(shape, n, contenders.label(beside, activations), time))
                rows.append(_row(shape, n, "cublas", _cublas(shape, n, dtype)))
                table.writerows(rows)
                file.flush()
                for row in sorted(rows, key=lambda row: row["microseconds"]):
                    print(*(row[name] for name in FIELDS), sep="  ", flush=True)


def _cell(
    shape: Shape, blend: Blend, n: int, activations: Activations, dtype: torch.dtype, within: float
) -> list[dict[str, Any]]:
    chip, label = hardware.of_device(0), contenders.label(blend, activations)
    weights = blend.packed(shape.oc, shape.ic, dtype, activations)
    problem, x = linear.mixed_problem(shape, blend, n, activations), contenders.random(n, shape.ic, dtype)
    chosen = mixed.choose(problem, chip)
    predicted = {config: mixed.seconds(problem, config, chip) * 1e6 for config in mixed.candidates(problem, chip)}
    least = min(predicted.values())
    found = []
    for config, time in sorted(predicted.items(), key=lambda pair: pair[1]):
        if time <= within * least or config == chosen:
            taken = timing.graph_microseconds(_calls(weights, x, partial(_one_launch, config)))
            found.append(
                _row(shape, n, label, taken, chosen=config == chosen, predicted=round(time, 2), config=str(config))
            )
    found.append(_row(shape, n, f"{label} apart", timing.graph_microseconds(_calls(weights, x, _apart))))
    return found


def _one_launch(config: mixed.MixedConfig, x: torch.Tensor, weight: MixedWeight) -> torch.Tensor:
    with ops.using(mixed=config):
        return ops.linear(x, weight)


def _apart(x: torch.Tensor, weight: MixedWeight) -> torch.Tensor:
    return mixed_ops.by_row_sets(x, weight, None, None, 0)


def _calls(
    weights: Sequence[MixedWeight], x: torch.Tensor, multiply: Callable[[torch.Tensor, MixedWeight], torch.Tensor]
) -> list[Callable[[], object]]:
    return [partial(multiply, x, weight) for weight in weights]


def _uniform(scheme: Any, shape: Shape, n: int, dtype: torch.dtype, activations: Activations) -> float:
    weights = contenders.packed(scheme, shape.oc, shape.ic, dtype, activations)
    x = contenders.random(n, shape.ic, dtype)
    return timing.graph_microseconds([partial(ops.linear, x, weight) for weight in weights])


def _cublas(shape: Shape, n: int, dtype: torch.dtype) -> float:
    return timing.graph_microseconds(contenders.cublas(dtype).build(shape.oc, shape.ic)(n, contenders.PLAIN))


def _row(shape: Shape, n: int, kernel: str, microseconds: float, **more: Any) -> dict[str, Any]:
    empty = {"chosen": "", "predicted": "", "config": ""}
    return {
        "weight": f"{shape.oc}x{shape.ic}",
        "n": n,
        "kernel": kernel,
        "microseconds": round(microseconds, 2),
        **empty,
        **more,
    }


if __name__ == "__main__":
    main()
