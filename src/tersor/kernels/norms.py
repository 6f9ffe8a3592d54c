"""Norms of rows: small/norm.cuh has a CTA for each of few rows, small/norm_rows.cuh a warp for each of many. A row gets
the same bits from both.

As in `kernels.routing`: a kernel's source, its launch prepared for a problem, then the launch, by addresses and sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from tersor.kernels.jit import Function, KernelSource
from tersor.kernels.small import norm_pieces, norm_threads

_THREADS = 512
_RESIDENT = {1: 4, 2: 2, 4: 1}
"""Pieces of a thread -> CTAs of so many threads whose registers a multiprocessor has room for."""
_MOST_RESIDENT = 16  # compute capability 8.6
_MANY = 8
"""Rows for each multiprocessor from which on they are many."""
_ROWS_OF_CTA = 4
"""Warps of a CTA that have a row each."""
_CTAS = ((4, 8), (8, 6), (16, 4), (24, 3), (32, 3))
_FEWER_CTAS = ((4, 7), (8, 5), (16, 3), (24, 2))
"""Pieces of a lane at most, and CTAs of such warps whose registers a multiprocessor has room for; with e4m3 of a layer
norm they are fewer."""


def _of_lane(channels: int) -> int:
    """Return how many pieces of a row a lane has, of a warp that normalises it alone."""
    return norm_pieces(channels) * norm_threads(channels) // 32


def ctas_of_warps(rows: int, channels: int, layer: bool, e4m3: bool, sms: int) -> int:
    """Return how many CTAs of warps that have a row each are to be on a multiprocessor: 0 where a CTA has a row.

    Args:
        rows: how many.
        channels, layer, e4m3: as for `norm_source`.
        sms: multiprocessors of the GPU.
    """
    of_lane, room = _of_lane(channels), _FEWER_CTAS if layer and e4m3 else _CTAS
    if rows < _MANY * sms:
        return 0
    found = next((count for most, count in room if of_lane <= most), 0)
    return found - (e4m3 and of_lane > 24 and found > 0)


@functools.cache
def norm_source(target: str, layer: bool, channels: int, e4m3: bool = False, warps: int = 0) -> KernelSource:
    """Return the kernel that normalises rows of so many channels, the same one for many numbers of them.

    Args:
        target: `float16` or `bfloat16`.
        layer: whether it is a layer norm; else it is an RMS norm.
        channels: at most `kernels.small.MOST_CHANNELS`.
        e4m3: whether the result becomes e4m3 with a scale a row, on compute capability 9.0 alone.
        warps: `ctas_of_warps`.
    """
    return _norm_source(target, layer, norm_pieces(channels), e4m3, _of_lane(channels) if warps else 0, warps)


@functools.cache
def _norm_source(target: str, layer: bool, pieces: int, e4m3: bool, of_lane: int, warps: int) -> KernelSource:
    parameters = {"BF16": target == "bfloat16", "LAYER": layer, "PIECES": pieces, "E4M3": e4m3}
    own = {"WARPS": of_lane // pieces, "RESIDENT": warps} if warps else {"RESIDENT": _RESIDENT[pieces]}
    kind = f"{target}_{pieces}" if not warps else f"{target}_rows_{of_lane}"
    return KernelSource(
        name=f"tersor_{'layer' if layer else 'rms'}_norm_{kind}{'_e4m3' * e4m3}",
        header="small/norm_rows.cuh" if warps else "small/norm.cuh",
        parameters={**parameters, **own},
        arguments="PPPPPPqqiiffi",
    )


NormLaunch: TypeAlias = Callable[..., None]
"""Launches a norm on one prepared problem: `launch` in `prepare_norm`."""


def prepare_norm(
    function: Function,
    *,
    rows: int,
    channels: int,
    eps: float,
    offset: float,
    sms: int,
    sm_threads: int,
    warps: int = 0,
) -> NormLaunch:
    """Return what launches the norm of `rows` rows, at least one.

    Args:
        function: `norm_source`, loaded.
        rows, channels: sizes.
        eps: is added to the mean of squares.
        offset: is added to the weights.
        sms, sm_threads: multiprocessors of the GPU, and threads that each has room for.
        warps: `ctas_of_warps`.
    """
    if warps:
        threads, ctas = 32 * _ROWS_OF_CTA, -(-rows // _ROWS_OF_CTA)
        ctas = -(-ctas // -(-ctas // (sms * warps)))  # all have as many rows
    else:
        pieces = norm_pieces(channels)
        threads = norm_threads(channels)
        ctas = min(rows, sms * min(min(_RESIDENT[pieces] * _THREADS, sm_threads) // threads, _MOST_RESIDENT))
    grid, block, run = (ctas, 1, 1), (threads, 1, 1), function.launch

    def launch(
        *, stream: int, x: int, stride: int, weight: int, bias: int, residual: int, out: int, out_stride: int,
        ready: bool, early: bool, scales: int = 0,
    ) -> None:  # fmt: skip
        """Launch; what is not there has the address 0.

        Args:
            stream: handle of the stream.
            x, stride: address of [rows, channels], and elements from one row to the next.
            residual: address of [rows, channels].
            weight, bias: addresses of [channels].
            out, out_stride: address of [rows, channels], of bytes with e4m3, and elements from one row to the next.
            ready: whether weight and bias were there before the kernel ahead started.
            early: whether the kernel may start before the one ahead has ended: it waits before it reads or writes.
            scales: address of float32 [rows], with e4m3.
        """
        addresses = (x, weight, bias, residual, out, scales)
        run(grid, block, 0, stream, (*addresses, stride, out_stride, rows, channels, eps, offset, ready), early)

    return launch
