"""Time the packed linear against cuBLAS FP16, FP8 (`torch._scaled_mm`) and, where installed, humming-kernels.

    python bench/linear.py --shapes 8192x8192,57344x8192 --n 1,2,4,8,16 --formats fp6_e3m2

Every number is the median over replays of a CUDA graph that walks over enough copies of the weight (0.7 GB) that none
stays in L2, in microseconds a call, on random data. `roof` is the packed bytes over the read bandwidth measured in the
same run.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import report
import timing
import torch

from tersor import formats, ops
from tersor.compress import quantize_rtn
from tersor.layouts import PackedWeight


def main() -> None:
    """Parse the command line, measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="8192x8192,57344x8192", help="OCxIC, separated by commas")
    parser.add_argument("--n", default="1,2,4,8,16,32,64,128,256,1024", help="numbers of tokens")
    parser.add_argument("--formats", default="fp6_e3m2", help="formats, with :g128 and the like for groups")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--output", default="linear_h200", help="name of the file under bench/results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("timing needs a CUDA device")
    dtype = getattr(torch, arguments.dtype)
    schemes = [scheme(text) for text in arguments.formats.split(",")]
    tokens = [int(n) for n in arguments.n.split(",")]
    bandwidth = timing.read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, reads at {bandwidth / 1e12:.2f} TB/s, {arguments.dtype}")
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes.split(","):
        oc, ic = (int(size) for size in shape.split("x"))
        times = {
            name: measure(build, ic, tokens, name == "fp8", dtype)
            for name, build in candidates(schemes, oc, ic, dtype).items()
        }
        for n in tokens:
            row: dict[str, Any] = {"oc": oc, "ic": ic, "n": n}
            row |= {name: round(by_n[n], 2) for name, by_n in times.items() if n in by_n}
            row |= {
                f"roof {label(s)}": round(oc * s.bits_per_weight(ic) * ic / 8 / bandwidth * 1e6, 1) for s in schemes
            }
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    path = report.write(arguments.output, {"dtype": arguments.dtype, "read_bandwidth": bandwidth, "rows": rows})
    print(f"written to {path}")


def scheme(text: str) -> formats.Scheme:
    """Read `fp6_e3m2` or `int4:g128`."""
    name, _, group = text.partition(":g")
    return formats.get_scheme(name, int(group) if group else None)


Calls = list[Callable[[torch.Tensor], Any]]


def candidates(schemes: list[formats.Scheme], oc: int, ic: int, dtype: torch.dtype) -> dict[str, Callable[[], Calls]]:
    """Return, for each contender, what builds its calls on enough copies of a random weight."""

    def dense() -> Calls:
        weights = [random(oc, ic, dtype) for _ in range(timing.copies(oc * ic * 2))]
        return [lambda x, w=w: torch.mm(x, w.T) for w in weights]

    def fp8() -> Calls:
        weights = [random(oc, ic, dtype).to(torch.float8_e4m3fn) for _ in range(timing.copies(oc * ic))]
        one = torch.ones((), device="cuda")
        return [
            lambda x, w=w: torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)
            for w in weights
        ]

    def packed(scheme: formats.Scheme) -> Calls:
        layout = ops.preferred_layout(scheme, dtype, torch.device("cuda", 0))
        weight = PackedWeight.from_encoded(quantize_rtn(random(oc, ic, dtype), scheme), scheme).to_layout(layout)
        weights = [
            PackedWeight(scheme, (oc, ic), weight.data.clone(), weight.scale.clone(), None, layout)
            for _ in range(timing.copies(weight.nbytes))
        ]
        return [lambda x, w=w: ops.linear(x, w) for w in weights]

    def humming(scheme: formats.Scheme) -> Calls:
        from humming.layer import HummingLayer

        name = scheme.format.name
        if scheme.format.kind == "float":
            name = f"float{scheme.format.bits}{name.partition('_')[2]}"
        config: dict[str, Any] = {"dtype": name}
        if scheme.group_size is not None:
            config["group_size"] = scheme.group_size
        layers = []
        weight = random(oc, ic, dtype)
        for _ in range(timing.copies(int(oc * ic * scheme.bits_per_weight(ic) / 8))):
            layer = HummingLayer(shape_n=oc, shape_k=ic, weight_config=config, torch_dtype=dtype).cuda()
            layer.load_from_unquantized(weight)
            layer.transform()
            layers.append(layer)
        return layers

    contenders: dict[str, Callable[[], Calls]] = {"cublas": dense, "fp8": fp8}
    for one in schemes:
        contenders[label(one)] = lambda one=one: packed(one)
        if installed("humming"):
            contenders[f"humming {label(one)}"] = lambda one=one: humming(one)
    return contenders


def measure(build: Callable[[], Calls], ic: int, tokens: list[int], fp8: bool, dtype: torch.dtype) -> dict[int, float]:
    """Time one contender at every number of tokens; its weights are released before the next one's are made."""
    calls = build()
    times = {}
    for n in tokens:
        x = random(n, ic, dtype)
        if fp8:
            x = x.to(torch.float8_e4m3fn)
        times[n] = timing.graph_microseconds([lambda call=call, x=x: call(x) for call in calls])
    return times


def random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a random matrix on the GPU."""
    return torch.randn(rows, columns, dtype=dtype, device="cuda")


def label(scheme: formats.Scheme) -> str:
    """Name a scheme in a column heading."""
    return scheme.name if scheme.group_size is None else f"{scheme.name}:g{scheme.group_size}"


def installed(package: str) -> bool:
    """Tell whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    main()
