"""Who goes over the columns of a weight while codes are chosen? A kernel a block, where a GPU has kernels.

The definition is `compress.sweeps`; sums within a block are in its order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from tersor.compress import sweeps
from tersor.formats import ElementFormat
from tersor.kernels import columns, jit
from tersor.ops import current, dispatch


def serve(sweep: sweeps.Sweep) -> sweeps.Block | None:
    """Return what launches a kernel for every block of a sweep; `None` without a GPU that has kernels."""
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


def load(formats: Iterable[ElementFormat], device: torch.device) -> None:
    """Compile and load what sweeps of formats will need on a device; nothing where the torch code serves there.

    Raises:
        CompileError, KernelError, UnsupportedError: as `jit.get`.
    """
    if dispatch.kernel_chip(device) is not None:
        for descend, format in itertools.product((False, True), dict.fromkeys(formats)):
            jit.get(_source(descend, format), device)


def source_of(sweep: sweeps.Sweep) -> jit.KernelSource:
    """Return the kernel that a sweep needs."""
    return _source(sweep.before is not None, sweep.grid.scheme.format)


def _source(descend: bool, format: ElementFormat) -> jit.KernelSource:
    return columns.columns_source(descend, (1 << format.bits) - 2 if format.kind == "float" else 0)


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
        kept=0 if sweep.kept is None else sweep.kept.data_ptr(),
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
