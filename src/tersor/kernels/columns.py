"""The columns of a block of a weight in turn, while codes are chosen: calibrate/columns.cuh rounds them, or has their
values descend, for all rows side by side.

As in `kernels.small`: the kernel's source, its launch prepared for a sweep, then the launch of each block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from tersor.kernels.jit import Function, KernelSource

MOST_COLUMNS = 128
"""Of a block: kColumns of calibrate/columns.cuh."""
MOST_MIDDLES = 254
"""Of a format of 8 bits, whose two zeros are one value."""

_ROWS = 8
"""Of a CTA, a warp each."""

ColumnsLaunch: TypeAlias = Callable[[int, int], None]
"""Launches one block of a prepared sweep: `launch` in `prepare_columns`."""


@functools.cache
def columns_source(descend: bool, middles: int) -> KernelSource:
    """Return the kernel for one kind of sweep.

    Args:
        descend: whether values descend; else weights are rounded.
        middles: how many numbers are halfway between values of a float format; 0 of an integer format.
    """
    return KernelSource(
        name=f"tersor_columns_{'descend' if descend else 'round'}_{middles}",
        header="calibrate/columns.cuh",
        parameters={"DESCEND": descend, "MIDDLES": middles},
        arguments="PPPPPPPPPPqiiff",
    )


def prepare_columns(
    function: Function, *, stream: int, given: int, before: int, scale: int, zero_point: int, groups: int,
    kept: int, matrix: int, table: int, values: int, changes: int, stride: int, rows: int, low: float, high: float,
) -> ColumnsLaunch:  # fmt: skip
    """Return what launches a sweep block by block.

    Args:
        function: `columns_source`, loaded.
        stream: handle of the stream.
        given: address of float32 [IC, rows], weights or gradients.
        before: address of the values to start from, float32 [IC, rows]; 0 where weights are rounded.
        scale, zero_point: addresses of float32 [G, rows].
        groups: address of int64 [IC].
        kept: address of float32 [IC, rows], 0 where a value is zero; 0 where all weights have one.
        matrix: address of float32 [IC, stride], the unit triangular factor or the Hessian.
        table: address of float32 values and middles; 0 of an integer format.
        values: address of float32 [IC, rows], where values go.
        changes: address of float32 [at least the columns of a block, rows], the same for all blocks.
        stride: numbers between rows of the matrix.
        rows: of the weight, at least one.
        low, high: the least and the largest integer beside a zero point of 0.
    """
    grid, block, run = (-(-rows // _ROWS), 1, 1), (32 * _ROWS, 1, 1), function.launch
    row, diagonal = 4 * rows, 4 * (stride + 1)

    def launch(start: int, end: int) -> None:
        """Launch the block of columns from `start` to `end`, at most `MOST_COLUMNS`."""
        at = start * row
        old, mask = (whole + at if whole else 0 for whole in (before, kept))
        addresses = (
            given + at,
            old,
            scale,
            zero_point,
            groups + 8 * start,
            mask,
            matrix + start * diagonal,
            table,
            values + at,
            changes,
        )
        run(grid, block, 0, stream, (*addresses, stride, end - start, rows, low, high))

    return launch


def sources() -> list[KernelSource]:
    """Return the kernels of integers and of floats of 3 to 8 bits, of both kinds of sweep."""
    return [columns_source(descend, middles) for descend in (False, True) for middles in (0, 6, 14, 30, 62, 126, 254)]
