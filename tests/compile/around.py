"""Which kernels around products do the compile tests build? Those of norms, rows, numbers, sampling and 8-bit rows."""

from __future__ import annotations

import itertools

from tersor.kernels import dense, norms, sampling, small
from tersor.kernels.jit import KernelSource
from tersor.layouts import decode_groups


def products() -> list[KernelSource]:
    """Return kernels of norms, rows, numbers and sampling: the most registers of each kind, every dtype, by turns."""
    few = ((small.MOST_CHANNELS, False), (4096, True), (small.MOST_CHANNELS, True), (4096, False))
    many = ((4096, True), (8192, False))
    kinds = [(size, False) for size in few] + [(size, True) for size in many]
    normed = [_norm(dtype, *size, False, warps) for size, warps in kinds for dtype in decode_groups.PAIR_TARGETS]
    copies = [small.rows_source("bfloat16", index64, index64) for index64 in (False, True)]
    draws = zip(*map(sampling.sources, (*sampling.INPUTS, "float32")), strict=True)
    sums = [small.all_reduce_source(*kind) for kind in (("float16", 2), ("bfloat16", small.MOST_RANKS))]
    copies += [small.resolve_source(), small.keep_source()]
    copies += [small.pointwise_source(("float16", "bfloat16")[gate % 2], gate, not gate) for gate in range(5)]
    copies += [small.heads_source(True), small.heads_source(False), small.trim_source()]
    return [*normed, *copies, *itertools.chain.from_iterable(draws), *sums]


def quantizing() -> list[KernelSource]:
    """Return kernels that make e4m3 of rows: alone, and of a norm's result, in the dtype with the most registers."""
    sizes, forms = (4096, 8192, small.MOST_CHANNELS), (("bfloat16", False), ("float16", True))
    normed = [_norm(dtype, size, layer, True, False) for size in sizes for dtype, layer in forms]
    normed += [_norm("bfloat16", size, size == 4096, True, True) for size in (4096, 8192)]
    return [*(dense.quantize_source(dtype) for dtype in decode_groups.PAIR_TARGETS), *normed]


def _norm(dtype: str, channels: int, layer: bool, e4m3: bool, many: bool) -> KernelSource:
    """Return the kernel that normalises few rows or many."""
    warps = norms.ctas_of_warps(1 << 20, channels, layer, e4m3, 132) if many else 0
    return norms.norm_source(dtype, layer, channels, e4m3, warps)
