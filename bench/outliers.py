"""Time what outliers cost a dense product on a GPU, with every weight cold: results/outliers_NAME.json.

    python bench/outliers.py                       0.5 % beside int4 in groups and fp6, three shapes, 1 to 2048 tokens
    python bench/outliers.py --percent 0.1,0.5,1 --tokens 8,16,32 --shapes 8192x8192 --ways dense,outliers
    python bench/outliers.py --tokens 128,512,2048 --ways dense,outliers,gathered,decoded

For each number of tokens: microseconds of the dense part alone, with outliers as `ops.linear` has them, gathered by the
fused kernel, in a weight that is decoded for cuBLAS, and with the small kernel ahead, as older GPUs and batch-invariant
calls have it; medians of CUDA graphs with programmatic dependence that walk over copies of the weight
(`tersor.bench.timing`). Results are checked against float32 once, of each way that is timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import results_file
import torch

from tersor import hardware, ops
from tersor.bench.timing import copies, graph_microseconds
from tersor.checkpoint.config import parse_scheme
from tersor.compress import encode
from tersor.formats import Outliers, Scheme
from tersor.kernels import tune
from tersor.layouts import PackedWeight
from tersor.layouts.outliers import rounds_of
from tersor.ops import dense, mode, outlier_sums

FORMATS = ("int4:g128", "fp6_e2m3")
SHAPES = ((8192, 8192), (28672, 8192), (57344, 8192))
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 2048)
WAYS = ("dense", "outliers", "gathered", "decoded", "ahead")


def made(of: Scheme, oc: int, ic: int, seed: int) -> PackedWeight:
    """Return a random weight on the GPU, in kernel tiles for float16."""
    generator = torch.Generator("cuda").manual_seed(seed)
    plain = torch.randn(oc, ic, generator=generator, device="cuda", dtype=torch.float16) / ic**0.5
    packed = PackedWeight.from_encoded(encode(plain, of))
    return packed.to_layout(ops.preferred_layout(of, torch.float16, torch.device("cuda")))


def ahead(x: torch.Tensor, weight: PackedWeight, own: PackedWeight) -> torch.Tensor:
    """Return the product whose outliers a kernel of their own sums up, whatever the number of tokens."""
    return dense.multiply(x, own, None, outlier_sums.add(x, weight, None), 0)


def gathered(x: torch.Tensor, weight: PackedWeight, config: tune.LinearConfig) -> torch.Tensor:
    """Return the product whose outliers the fused kernel adds, whatever the number of tokens."""
    with mode.using(config=config):
        return ops.linear(x, weight)


def config_of(weight: PackedWeight, n: int) -> tune.LinearConfig:
    """Return how that kernel runs."""
    kept, chip = weight.scheme.outliers, hardware.of_device(0)
    assert kept is not None
    problem = tune.LinearProblem.of(weight.dense.packing, weight.shape, n)
    config = tune.choose_beside(problem, rounds_of(kept, weight.shape[1]), chip)
    assert config is not None, f"no kernel gathers for {n} tokens"
    return config


def measure(of: Scheme, shape: tuple[int, int], tokens: list[int], names: list[str]) -> list[dict[str, Any]]:
    """Return a row for every number of tokens, with the times of the ways that are named."""
    first = made(of, *shape, 0)
    weights = [first, *(_copy(first) for _ in range(copies(first.nbytes) - 1))]
    owns = [weight.dense for weight in weights]
    decoded, rows = first.dequantize(), []
    for n in tokens:
        x = torch.randn(n, shape[1], device="cuda", dtype=torch.float16)
        config = config_of(first, n)
        pairs = list(zip(weights, owns, strict=True))
        ways: dict[str, list[Callable[[], torch.Tensor]]] = {
            "dense": [partial(ops.linear, x, own) for own in owns],
            "outliers": [partial(ops.linear, x, weight) for weight in weights],
            "gathered": [partial(gathered, x, weight, config) for weight in weights],
            "decoded": [partial(outlier_sums.decoded, x, *pair, None, None) for pair in pairs],
            "ahead": [partial(ahead, x, *pair) for pair in pairs],
        }
        exact = x.float() @ decoded.T
        for name in names:
            error = 0.0 if name == "dense" else float((ways[name][0]().float() - exact).abs().max())
            assert error < 0.05, f"{name}: {n} tokens err by {error:.3g}"
        with torch.inference_mode():
            times = {name: graph_microseconds(ways[name]) for name in names}
        rows.append({"scheme": of.key(), "oc": shape[0], "ic": shape[1], "n": n, **times})
        each = ", ".join(f"{name} {time:8.2f} us ({time / times[names[0]]:.3f})" for name, time in times.items())
        print(f"{of.key():40} {shape[0]:6}x{shape[1]:<6} n={n:<4} {each}", flush=True)
    return rows


def _copy(weight: PackedWeight) -> PackedWeight:
    assert weight.outliers is not None and weight.arranged is not None
    kept = {"outliers": weight.outliers.clone(), "arranged": weight.arranged.clone()}
    return replace(weight, data=weight.data.clone(), scale=weight.scale.clone(), **kept)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--percent", default="0.5")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--shapes", default=",".join(f"{oc}x{ic}" for oc, ic in SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--ways", default=",".join(WAYS), help="the first is what ratios are to")
    given = parser.parse_args()
    tokens = [int(n) for n in given.tokens.split(",")]
    shapes = [tuple(map(int, shape.split("x"))) for shape in given.shapes.split(",")]
    rows: list[dict[str, Any]] = []
    for name, percent, (oc, ic) in itertools.product(given.formats.split(","), given.percent.split(","), shapes):
        of = replace(parse_scheme(name, None, None, "--formats"), outliers=Outliers(float(percent), "bfloat16"))
        rows += measure(of, (oc, ic), tokens, given.ways.split(","))
    print(results_file.write(f"outliers_{results_file.gpu()}", {"kind": "outliers", "rows": rows}))


if __name__ == "__main__":
    main()
