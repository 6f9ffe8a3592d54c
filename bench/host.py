"""Time what a packed linear costs on the host, from Python to the launch.

    python bench/host.py --n 1,16,128

Enqueues calls without waiting for the GPU, on a shape so small that the GPU is never behind, and divides: microseconds
a call, the best of several rounds. `launch` is the kernel's launch alone, `linear` is `tersor.ops.linear`, `layer` a
`PackedLinear`, `operator` the registered operator through torch's dispatcher, and `torch` a plain `nn.Linear`.
`fresh` is `tersor.ops.linear` with a number of tokens not seen before, which most steps that read prompts have.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import results_file
import torch

from tersor import formats, ops
from tersor.compress import quantize_rtn
from tersor.kernels.tune import choice
from tersor.layouts import PackedWeight
from tersor.nn import PackedLinear
from tersor.ops import mode, prepared

OC, IC = 256, 512
CALLS = 200
ROUNDS = 50
FRESH = range(272, 2048, 16)
"""Numbers of tokens, each of which has its tile predicted."""


def main() -> None:
    """Parse the command line, measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", default="1,16,128", help="numbers of tokens")
    parser.add_argument("--format", default="fp6_e3m2", help="of the weight")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("timing needs a CUDA device")
    scheme = formats.get_scheme(arguments.format)
    weight = PackedWeight.from_encoded(quantize_rtn(torch.randn(OC, IC, device="cuda"), scheme))
    weight = weight.to_layout(ops.preferred_layout(scheme, torch.float16, torch.device("cuda", 0)))
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for n in (int(n) for n in arguments.n.split(",")):
            row: dict[str, Any] = {"n": n}
            row |= {name: round(microseconds(call), 2) for name, call in candidates(weight, n).items()}
            row["fresh"] = round(fresh(weight), 1)
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    gpu = results_file.gpu()
    path = results_file.write(f"host_{gpu}", {"oc": OC, "ic": IC, "format": arguments.format, "rows": rows})
    print(f"written to {path}")


def candidates(weight: PackedWeight, n: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name, on `n` tokens."""
    x = torch.randn(n, IC, dtype=torch.float16, device="cuda")
    y = torch.empty(n, OC, dtype=torch.float16, device="cuda")
    layer = PackedLinear.from_packed(weight, dtype=torch.float16)
    dense = torch.nn.Linear(IC, OC, bias=False, dtype=torch.float16, device="cuda")
    chosen = prepared.type_of(weight).prepared((n, x.dtype, 0, True, False, 0), mode.current())
    operator = torch.ops.tersor.linear.default
    key = weight.scheme.key()
    found: dict[str, Callable[[], object]] = {
        "operator": lambda: operator(x, weight.data, weight.scale, None, None, key, OC, IC, weight.layout),
        "linear": lambda: ops.linear(x, weight),
        "layer": lambda: layer(x),
        "torch": lambda: dense(x),
    }
    if chosen.launch is not None:
        launch, stream = chosen.launch, torch.cuda.current_stream().cuda_stream
        parts = torch.empty(max(chosen.floats, 1), dtype=torch.float32, device="cuda")
        counters = torch.zeros(max(chosen.counters, 1), dtype=torch.int32, device="cuda")
        tensors = (weight.data, weight.scale, x, y, parts, counters)
        packed, scale, source, target, partial, arrived = (tensor.data_ptr() for tensor in tensors)

        def launch_alone(tensors: object = tensors) -> None:  # keeps the memory
            launch(
                stream=stream,
                weight=packed,
                scale=scale,
                x=source,
                x_stride=IC,
                x_scale=0,
                bias=0,
                residual=0,
                y=target,
                partial=partial,
                arrived=arrived,
                early=True,
            )

        found = {"launch": launch_alone, **found}
    return found


def microseconds(call: Callable[[], object]) -> float:
    """Return the time of one call on the host: the best of several rounds, each of which starts with an idle GPU."""
    samples = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return min(samples)


def fresh(weight: PackedWeight) -> float:
    """Return the time of one call on the host with a number of tokens that nothing is prepared for: the median.

    Kernels are there, and costs of tiles are read.
    """
    x = torch.randn(FRESH[-1], IC, dtype=torch.float16, device="cuda")
    samples: list[float] = []
    for _ in range(2):
        prepared.forget()
        choice.forget()
        samples.clear()
        for n in FRESH:
            rows = x[:n]
            start = time.perf_counter()
            ops.linear(rows, weight)
            samples.append((time.perf_counter() - start) * 1e6)
        torch.cuda.synchronize()
    return statistics.median(samples)


if __name__ == "__main__":
    main()
