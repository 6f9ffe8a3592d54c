"""Attention of rows of many new tokens on compute capability 9.0: attention/sm90_prefill.cuh, behind append.cuh.

As in `kernels.dense`: a kernel's source, its launch prepared for a problem, then the launch, by addresses and sizes.
"""

from __future__ import annotations

import functools

from tersor.hardware import Chip
from tersor.kernels.attention import PAGE, Kind, PrefillLaunch, Problem
from tersor.kernels.jit import Function, KernelSource, tensor_map

LEAST_DIM = 64
QUERIES = 128
"""Queries of a tile: those of all heads that share keys, token by token."""
COUNTERS = 1
"""uint32 that are zero between launches."""

_THREADS = 384
_MOST_SLOTS = 8
_ITEM_SLOTS, _ITEM_BYTES, _BARRIER_BYTES = 2, 32, 16


def takes(kind: Kind, chip: Chip) -> bool:
    """Tell whether the kernel serves such heads and pages on a chip; prefill.cuh serves all."""
    return chip.capability == (9, 0) and kind.head_dim >= LEAST_DIM and not kind.e4m3


@functools.cache
def prefill_source(kind: Kind, chip: Chip) -> KernelSource:
    """Return the kernel for rows of many new tokens that are in pages already, of a `Kind` that it takes."""
    row = -(-kind.head_dim // 64) * 128
    block_pages = 2 if kind.head_dim <= 128 else 1
    query_slots = 2 if kind.head_dim <= 192 else 1
    slot, query_slot = block_pages * PAGE * row, QUERIES * row
    rest = query_slots * (query_slot + _BARRIER_BYTES) + _ITEM_SLOTS * (_ITEM_BYTES + _BARRIER_BYTES)
    slots = min((chip.shared_bytes - rest) // (slot + _BARRIER_BYTES), _MOST_SLOTS)
    return KernelSource(
        name=f"tersor_attention_sm90_prefill_{kind.name}",
        header="attention/sm90_prefill.cuh",
        parameters={
            **kind.parameters,
            "BLOCK_PAGES": block_pages,
            "SLOTS": slots,
            "QUERY_SLOTS": query_slots,
            "SHARED_BYTES": slots * (slot + _BARRIER_BYTES) + rest,
        },
        arguments="TPPPPPPiiiiiiff",
    )


def prepare_prefill(function: Function, kind: Kind, problem: Problem, sms: int) -> PrefillLaunch:
    """Return what launches attention of the rows of many new tokens, which append.cuh has brought to pages.

    Args:
        function: `prefill_source` of this module, loaded.
        kind: what it is compiled for.
        problem: what the host knows.
        sms: multiprocessors of the GPU, each of which has one CTA that takes tiles in turn.
    """
    of_row = -(-problem.most_queries * (problem.heads // problem.kv_heads) // QUERIES) * problem.kv_heads
    size, block = (min(sms, problem.rows * of_row), 1, 1), (_THREADS, 1, 1)
    shared, run, maps_rows = int(function.source.parameters["SHARED_BYTES"]), function.launch, tensor_map.rows
    window, scale, soft = problem.scores
    element = tensor_map.BFLOAT16 if kind.dtype == "bfloat16" else tensor_map.FLOAT16

    def launch(
        *,
        stream: int,
        pages_of_layer: int,
        page_count: int,
        starts: int,
        lengths: int,
        table: int,
        sinks: int,
        wide_sinks: bool,
        out: int,
        taken: int,
        early: bool,
    ) -> None:
        """Launch; arguments are those of `kernels.attention.prepare_decode`, and two more.

        Args:
            page_count: how many pages there are.
            taken: address of COUNTERS, which are zero again after.
        """
        tokens = page_count * 2 * problem.kv_heads * PAGE
        pages = maps_rows(pages_of_layer, tokens, kind.head_dim, kind.head_dim, element, PAGE)
        # fmt: off
        run(size, block, shared, stream, (
            pages, starts, lengths, table, sinks, out, taken, problem.rows, problem.table_stride, problem.heads,
            problem.kv_heads, window, wide_sinks, scale, soft,
        ), early)
        # fmt: on

    return launch
