"""What outliers add to a dense product: dense/outlier_sums.cuh, ahead of it dense/turned.cuh where tokens are many.

As in `kernels.routing`: a kernel's source, its launch prepared for a problem, then the launch, by addresses and sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from tersor.kernels.jit import Function, KernelSource

FEW = (1, 2, 4)
"""Tokens that a kernel reads where they stand."""
TURNED = 8
"""Tokens of a tile where there are more: those of a channel are 16 bytes."""

_ROWS = 64
_THREADS = 256

SumsLaunch: TypeAlias = Callable[..., None]
"""Launches the sums of one prepared problem: `launch` in `prepare_sums`."""
TurnLaunch: TypeAlias = Callable[..., None]
"""Launches the turning of one prepared problem: `launch` in `prepare_turn`."""


def tile(n: int) -> int:
    """Return the tokens of a tile of the kernel that serves `n` of them."""
    return next((few for few in FEW if n <= few), TURNED)


@functools.cache
def sums_source(target: str, outliers: str, tokens: int) -> KernelSource:
    """Return the kernel that sums up outliers.

    Args:
        target: `float16` or `bfloat16`, of activations and results.
        outliers: the same of the outliers.
        tokens: of a tile, one of `FEW` or `TURNED`.
    """
    return KernelSource(
        name=f"tersor_outlier_sums_{target}_{outliers}_{tokens}",
        header="dense/outlier_sums.cuh",
        parameters={"BF16": target == "bfloat16", "VALUE_BF16": outliers == "bfloat16", "TOKENS": tokens},
        arguments="PPPPqiii",
    )


def turn_source() -> KernelSource:
    """Return the kernel that turns activations, of either dtype."""
    return _TURN


_TURN = KernelSource(name="tersor_turned", header="dense/turned.cuh", parameters={}, arguments="PPqii")


def prepare_sums(function: Function, *, count: int, oc: int, n: int) -> SumsLaunch:
    """Return what launches the sums of `n` tokens, at least one.

    Args:
        function: `sums_source` of `tile(n)` tokens, loaded.
        count: outliers of a row, at least one.
        oc, n: rows of the weight, and tokens.
    """
    grid, run, sizes = (-(-oc // _ROWS), -(-n // tile(n)), 1), function.launch, (count, oc, n)

    def launch(*, stream: int, x: int, stride: int, words: int, residual: int, out: int, early: bool) -> None:
        """Launch.

        Args:
            stream: handle of the stream.
            x, stride: address of [n, IC] and elements from one token to the next or, of `TURNED` tokens a tile, of what
                `prepare_turn` makes and from one channel to the next.
            words: address of the outliers.
            residual: address of [n, oc] in the dtype of x, or 0.
            out: address of [n, oc].
            early: as in `norms.prepare_norm`.
        """
        run(grid, (_THREADS, 1, 1), 0, stream, (x, words, residual, out, stride, *sizes), early)

    return launch


def turned_stride(n: int) -> int:
    """Return the elements from one channel of turned activations to the next."""
    return -(-n // TURNED) * TURNED


def prepare_turn(function: Function, *, ic: int, n: int) -> TurnLaunch:
    """Return what launches the turning of `n` tokens of `ic` channels, at least one of each."""
    grid, run, sizes = (-(-ic // _THREADS), -(-n // TURNED), 1), function.launch, (ic, n)

    def launch(*, stream: int, x: int, stride: int, turned: int, early: bool) -> None:
        """Launch.

        Args:
            stream: handle of the stream.
            x, stride: address of [n, ic], and elements from one token to the next.
            turned: address of [ic, turned_stride(n)], on 16 bytes.
            early: as in `norms.prepare_norm`.
        """
        run(grid, (_THREADS, 1, 1), 0, stream, (x, turned, stride, *sizes), early)

    return launch


def sources(target: str, outliers: str, tokens: int) -> list[KernelSource]:
    """Return the kernels that calls of up to so many tokens ask for."""
    tiles = sorted({tile(n) for n in range(1, min(tokens, FEW[-1] + 1) + 1)})
    turn = [turn_source()] if TURNED in tiles else []
    return [*turn, *(sums_source(target, outliers, one) for one in tiles)]
