"""Which kernels around products do the compile tests build? Of norms, rows, numbers, sampling, 8-bit rows, columns."""

from __future__ import annotations

import itertools

from tersor.formats import Activations
from tersor.kernels import columns, norms, outliers, sampling, small
from tersor.kernels.jit import KernelSource
from tersor.kernels.quantizing import quantize_source
from tersor.layouts import decode_groups


def products() -> list[KernelSource]:
    """Return kernels of norms, rows, numbers and sampling: the most registers, every dtype, by turns."""
    kinds = ((small.MOST_CHANNELS, False), (4096, True), (small.MOST_CHANNELS, True), (4096, False))
    normed = [norms.norm_source(dtype, layer, size) for size, layer in kinds for dtype in decode_groups.PAIR_TARGETS]
    copies = [small.rows_source("bfloat16", index64, index64) for index64 in (False, True)]
    draws = zip(*map(sampling.sources, (*sampling.INPUTS, "float32")), strict=True)
    sums = [small.all_reduce_source(*kind) for kind in (("float16", 2), ("bfloat16", small.MOST_RANKS))]
    copies += [small.resolve_source(), small.keep_source()]
    copies += [small.pointwise_source(("float16", "bfloat16")[gate % 2], gate, not gate) for gate in range(5)]
    copies += [small.heads_source(True), small.heads_source(False), small.trim_source()]
    copies += [outliers.turn_source(), *(outliers.sums_source("bfloat16", "float16", n) for n in (*outliers.FEW, 8))]
    return [*normed, *copies, *itertools.chain.from_iterable(draws), *sums]


def quantizing() -> list[KernelSource]:
    """Return kernels that make bytes of rows: alone, and of a norm's result, in the dtype with the most registers."""
    sizes, forms = (4096, 8192, small.MOST_CHANNELS), (("bfloat16", False), ("float16", True))
    normed = [norms.norm_source(dtype, layer, size, Activations.E4M3) for size in sizes for dtype, layer in forms]
    of_warps = [(size, norms.ctas_of_warps(1 << 20, size, 132)) for size in (4096, 5120)]
    normed += [norms.norm_source("bfloat16", False, size, Activations.E4M3, warps) for size, warps in of_warps]
    whole = Activations.INT8
    normed += [norms.norm_source("bfloat16", False, 4096, whole), norms.norm_source("float16", False, 5120, whole, 3)]
    groups = Activations.INT8_GROUPS
    normed += [
        norms.norm_source("bfloat16", False, 8192, groups),
        norms.norm_source("bfloat16", False, 5120, groups, 3),
    ]
    bytewise = [("float16", Activations.E4M3), ("bfloat16", Activations.E4M3), ("bfloat16", whole), ("float16", groups)]
    activated = [("float16", groups, 2), ("bfloat16", Activations.E4M3, 3)]
    return [*itertools.starmap(quantize_source, [*bytewise, *activated]), *normed]


def calibrating() -> list[KernelSource]:
    """Return kernels that choose codes: of integers, of small and of large formats, of both kinds of sweep."""
    return columns.sources()[::3]
