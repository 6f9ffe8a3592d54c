"""Who goes over the columns of a weight while codes are chosen? A kernel a block, where a GPU has kernels.

The definition is `compress.sweeps`; sums within a block are in its order.
"""

from __future__ import annotations

import torch

from tersor.compress import sweeps
from tersor.kernels import columns, jit
from tersor.ops import current, dispatch


def serve(sweep: sweeps.Sweep) -> sweeps.Block | None:
    """Return what launches a kernel for every block of a sweep; `None` where the torch code goes over them."""
    if dispatch.kernel_chip(sweep.given.device) is None:
        return None
    index = sweep.given.get_device()
    function = jit.get(source_of(sweep), index)
    launch = prepared(sweep, function, current.stream(index))

    def block(start: int, end: int) -> None:
        if current.device() == index:
            return launch(start, end)
        with torch.cuda.device(index):
            return launch(start, end)

    return block


def source_of(sweep: sweeps.Sweep) -> jit.KernelSource:
    """Return the kernel that a sweep needs."""
    floats = sweep.grid.scheme.format.kind == "float"
    return columns.columns_source(sweep.before is not None, len(sweep.grid.middles) if floats else 0)


def prepared(sweep: sweeps.Sweep, function: jit.Function, stream: int) -> columns.ColumnsLaunch:
    """Return what launches blocks of a sweep; the caller keeps its tensors.

    Args:
        sweep: on the device of the function.
        function: `source_of`, loaded.
        stream: handle of the stream.
    """
    grid = sweep.grid
    return columns.prepare_columns(
        function,
        stream=stream,
        given=sweep.given.data_ptr(),
        before=0 if sweep.before is None else sweep.before.data_ptr(),
        scale=sweep.scale.data_ptr(),
        zero_point=sweep.zero_point.data_ptr(),
        groups=sweep.groups.data_ptr(),
        matrix=sweep.matrix.data_ptr(),
        table=grid.table.data_ptr(),
        values=sweep.values.data_ptr(),
        changes=sweep.changes.data_ptr(),
        stride=sweep.matrix.stride(0),
        rows=sweep.given.shape[1],
        low=grid.least,
        high=grid.largest,
    )


sweeps.serve_with("cuda", serve)
