"""Time a product, the RMS norm behind it and the product behind that, with the norm a kernel and folded into both.

    python bench/norm_fold.py
    python bench/norm_fold.py --format fp4_e2m1 --n 1,2,4,8,16,32,64

Shapes are those of Llama-3-8B: the output of attention, then gate and up at once; down, then queries, keys and values.
A CUDA graph walks over copies of the weights that together do not fit the L2 cache; every launch starts before the one
ahead has ended. Microseconds of all that is between the activations of the first and the result of the second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import results_file
import torch

from tersor import formats, ops
from tersor.bench import timing
from tersor.compress import quantize_rtn
from tersor.layouts import PackedWeight

PAIRS = {
    "out, gate and up": ((4096, 4096), (28672, 4096), True),
    "down, qkv": ((4096, 14336), (6144, 4096), False),
}
"""Shapes (OC, IC) of both products, and whether the second is gated."""
EPS = 1e-5


def main() -> None:
    """Parse the command line, measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", default="1,8,32", help="numbers of tokens")
    parser.add_argument("--format", default="fp6_e3m2", help="of the weights")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16", help="of activations")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("timing needs a CUDA device")
    scheme, dtype = formats.get_scheme(arguments.format), getattr(torch, arguments.dtype)
    found: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name, (first, second, gated) in PAIRS.items():
            made = copies(scheme, first, dtype), copies(scheme, second, dtype)
            for n in (int(n) for n in arguments.n.split(",")):
                calls = chains(*made, n, dtype, gated)
                row = {side: round(timing.graph_microseconds(calls[side]), 2) for side in calls}
                found.append({"pair": name, "n": n, **row})
                print(
                    f"{name:18} n {n:3}  " + "  ".join(f"{side} {us:7.2f} us" for side, us in row.items()), flush=True
                )
            del made
            torch.cuda.empty_cache()
    gpu = results_file.gpu()
    about = {"format": arguments.format, "dtype": arguments.dtype}
    print(f"written to {results_file.write(f'norm_fold_{gpu}', {**about, 'rows': found})}")


def copies(scheme: formats.Scheme, shape: tuple[int, int], dtype: torch.dtype) -> list[PackedWeight]:
    """Return copies of a random weight, as many as keep any of them from staying in L2."""
    weight = PackedWeight.from_encoded(quantize_rtn(torch.randn(shape, device="cuda") * shape[1] ** -0.5, scheme))
    weight = weight.to_layout(ops.preferred_layout(scheme, dtype, weight.data.device))
    return [
        replace(weight, data=weight.data.clone(), scale=weight.scale.clone())
        for _ in range(timing.copies(weight.data.nbytes))
    ]


def chains(
    firsts: list[PackedWeight], seconds: list[PackedWeight], n: int, dtype: torch.dtype, gated: bool
) -> dict[str, list[Callable[[], object]]]:
    """Return what is timed: the three as they are without folding, folded, and without any norm."""
    hidden, inner = firsts[0].shape
    x = torch.randn(n, inner, dtype=dtype, device="cuda")
    residual = torch.randn(n, hidden, dtype=dtype, device="cuda")
    weight = torch.rand(hidden, dtype=dtype, device="cuda") + 0.5
    norm, multiply = ops.FoldedNorm.of(weight, EPS), ops.gated_linear if gated else ops.linear
    if not ops.folds_norm(x, firsts[0], seconds[0], gated):
        raise SystemExit(f"no kernels fold a norm between products of {n} tokens")

    def kernel(first: PackedWeight, second: PackedWeight) -> torch.Tensor:
        return multiply(ops.rms_norm(ops.linear(x, first, residual=residual), weight, EPS), second)

    def folded(first: PackedWeight, second: PackedWeight) -> torch.Tensor:
        return ops.linear_norm_in(ops.linear_norm_out(x, first, norm, residual=residual), second, gate=int(gated))

    def without(first: PackedWeight, second: PackedWeight) -> torch.Tensor:
        return multiply(ops.linear(x, first, residual=residual), second)

    count = max(len(firsts), len(seconds))
    pairs = [(firsts[i % len(firsts)], seconds[i % len(seconds)]) for i in range(count)]
    sides = {"kernel": kernel, "folded": folded, "no norm": without}
    return {name: [lambda run=run, pair=pair: run(*pair) for pair in pairs] for name, run in sides.items()}


if __name__ == "__main__":
    main()
