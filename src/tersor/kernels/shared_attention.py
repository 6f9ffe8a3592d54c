"""What rows with a common beginning read together: attention/shared.cuh, or sm90_shared.cuh, ahead of
attention/decode.cuh.

As in `kernels.attention`: the kernel's source, its launch prepared for a problem, then the launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from tersor.hardware import Chip
from tersor.kernels import attention_sm90
from tersor.kernels.attention import PAGE, SHARED_QUERIES, Kind, Problem, stages
from tersor.kernels.decode_attention import Grid
from tersor.kernels.jit import Function, KernelSource

_THREADS = 128
_CTAS_OF_SM = 2


def shared_source(kind: Kind, chip: Chip) -> KernelSource:
    """Return the kernel for pages that rows of one new token begin with."""
    if attention_sm90.takes(kind, chip):
        return attention_sm90.shared_source(kind, chip)
    return _source(kind, chip)


@functools.cache
def _source(kind: Kind, chip: Chip) -> KernelSource:
    rest = SHARED_QUERIES * kind.query_stride
    of_stage = 2 * PAGE * (kind.row_stride + (4 if kind.e4m3 else 0))
    depth = stages(chip, of_stage, rest, 1, 3)
    return KernelSource(
        name=f"tersor_attention_shared_{kind.name}",
        header="attention/shared.cuh",
        parameters={
            **kind.parameters,
            "ROW_TILES": 1,
            "PAGE_PARTS": 2 if kind.head_dim > 192 else 1,
            "STAGES": depth,
            "SHARED_BYTES": depth * of_stage + rest,
        },
        arguments="PPPPPPPPPPqiiiiiiiiiiffff",
    )


SharedLaunch: TypeAlias = Callable[..., None]
"""Launches shared.cuh on one prepared problem: `launch` in `prepare_shared`."""


def prepare_shared(
    function: Function, kind: Kind, problem: Problem, grid: Grid, item_queries: int, sms: int
) -> SharedLaunch:
    """Return what launches the common part of attention, whose parts decode.cuh adds up.

    Args:
        function: `shared_source`, loaded.
        kind: what it is compiled for.
        problem: what the host knows.
        grid: of decode.cuh.
        item_queries: queries that share keys in a CTA of decode.cuh.
        sms: of the GPU.
    """
    parameters, run = function.source.parameters, function.launch
    shared_bytes, by_groups = int(parameters["SHARED_BYTES"]), "GROUPS" in parameters
    ctas, threads = _CTAS_OF_SM, _THREADS
    if by_groups:
        ctas, threads = int(parameters["RESIDENT"]), attention_sm90.SHARED_THREADS
    size, block = (ctas * sms, 1, 1), (threads, 1, 1)
    _, scale, soft = problem.scores

    def launch(
        *,
        stream: int,
        qkv: int,
        stride: int,
        pages_of_layer: int,
        page_count: int,
        scales: int,
        starts: int,
        lengths: int,
        table: int,
        rotary: int,
        norms: tuple[int, int],
        partial: int,
        shared: int,
        settled: bool,
        early: bool,
    ) -> None:
        """Launch; arguments are those of `decode_attention.prepare_decode`, and `page_count`: pages that there are."""
        maps = (attention_sm90.map_of(kind, problem, pages_of_layer, page_count),) if by_groups else ()
        # fmt: off
        arguments = (
            *maps, qkv, pages_of_layer, scales, starts, lengths, table, rotary, norms[0], partial, shared, stride,
            problem.table_stride, problem.rows, problem.heads, problem.kv_heads, problem.rotary_dim, settled,
            grid.slots, grid.part_queries, item_queries, grid.items, scale, soft, problem.eps, problem.offset,
        )
        # fmt: on
        run(size, block, shared_bytes, stream, arguments, early)

    return launch
