"""Norms of rows: small/norm.cuh has a CTA for each row, small/norm_rows.cuh a warp for each of many that an RMS norm
makes bytes of. A row gets the same bits from both.

As in `kernels.routing`: a kernel's source, its launch prepared for a problem, then the launch, by addresses and sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from tersor.formats import Activations
from tersor.kernels.jit import Function, KernelSource
from tersor.kernels.macros import quantized_macros
from tersor.kernels.small import norm_pieces, norm_threads

_THREADS = 512
_RESIDENT = {1: 4, 2: 2, 4: 1}
"""Pieces of a thread -> CTAs of so many threads whose registers a multiprocessor has room for."""
_MOST_RESIDENT = 16  # compute capability 8.6
_MANY = 12
"""Rows for each multiprocessor from which on they are many."""
_ROWS_OF_CTA = 4
"""Warps of a CTA that have a row each."""
_CTAS = ((4, 8), (8, 6), (16, 4), (20, 3))
"""Pieces of a lane at most, and CTAs of such warps whose registers a multiprocessor has room for; with more a CTA for
each row is as fast."""


def _of_lane(channels: int) -> int:
    """Return how many pieces of a row a lane has, of a warp that normalises it alone."""
    return norm_pieces(channels) * norm_threads(channels) // 32


def ctas_of_warps(rows: int, channels: int, sms: int) -> int:
    """Return how many CTAs of warps that have a row each are to be on a multiprocessor: 0 where a CTA has a row.

    Args:
        rows: how many, which become bytes by an RMS norm without a residual.
        channels: of a row.
        sms: multiprocessors of the GPU.
    """
    if rows < _MANY * sms:
        return 0
    return next((count for most, count in _CTAS if _of_lane(channels) <= most), 0)


@functools.cache
def norm_source(
    target: str, layer: bool, channels: int, activations: Activations = Activations.NATIVE, warps: int = 0
) -> KernelSource:
    """Return the kernel that normalises rows of so many channels, the same one for many numbers of them.

    Args:
        target: `float16` or `bfloat16`.
        layer: whether it is a layer norm; else it is an RMS norm.
        channels: at most `kernels.small.MOST_CHANNELS`.
        activations: what the result becomes: bytes with a scale a row on compute capability 9.0 alone.
        warps: `ctas_of_warps` for such rows, or 0.
    """
    return _norm_source(target, layer, norm_pieces(channels), activations, _of_lane(channels) if warps else 0, warps)


@functools.cache
def _norm_source(
    target: str, layer: bool, pieces: int, activations: Activations, of_lane: int, warps: int
) -> KernelSource:
    native = activations is Activations.NATIVE
    parameters = {"BF16": target == "bfloat16", "PIECES": pieces, "BYTES": not native, **quantized_macros(activations)}
    suffix = "" if native else "_e4m3" if activations is Activations.E4M3 else f"_{activations.word}"
    if warps:
        return KernelSource(
            name=f"tersor_rms_norm_rows_{target}_{of_lane}{suffix}",
            header="small/norm_rows.cuh",
            parameters={**parameters, "WARPS": of_lane // pieces, "RESIDENT": warps},
            arguments="PPPPqqiiffi",
        )
    return KernelSource(
        name=f"tersor_{'layer' if layer else 'rms'}_norm_{target}_{pieces}{suffix}",
        header="small/norm.cuh",
        parameters={**parameters, "LAYER": layer, "RESIDENT": _RESIDENT[pieces]},
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
            out, out_stride: address of [rows, channels], of bytes where the result becomes those, and elements from one
                row to the next.
            ready: whether weight and bias were there before the kernel ahead started.
            early: whether the kernel may start before the one ahead has ended: it waits before it reads or writes.
            scales: address of float32 [rows], where the result becomes bytes, or of those of groups (quantized.cuh).
        """
        addresses = (x, weight, out, scales) if warps else (x, weight, bias, residual, out, scales)
        run(grid, block, 0, stream, (*addresses, stride, out_stride, rows, channels, eps, offset, ready), early)

    return launch
