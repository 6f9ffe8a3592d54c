"""Attention by products of warpgroups on compute capability 9.0: attention/sm90_prefill.cuh, behind append.cuh, of rows
of many new tokens. Also the source of sm90_shared.cuh, which `kernels.shared_attention` launches.

As in `kernels.dense`: a kernel's source, its launch prepared for a problem, then the launch, by addresses and sizes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tersor.hardware import Chip
from tersor.kernels.attention import PAGE, SHARED_QUERIES, Kind, PrefillLaunch, Problem, stages_beside
from tersor.kernels.jit import Function, KernelSource, tensor_map

LEAST_DIM = 64
QUERIES = 128
"""Queries of a tile: those of all heads that share keys, token by token."""

_THREADS = 384
_MAP_BYTES = 128
_MOST_SLOTS = 8
_GROUPS = 2
"""Warpgroups that multiply, of 128 threads."""
_ITEM_SLOTS, _ITEM_BYTES, _BARRIER_BYTES, _LAST_BYTES = 2, 32, 16, 16
_RAW_SLOTS = 2
_LEAST_BLOCKS, _MOST_SPLITS = 4, 16
"""Of a part, where the longest text is dealt out."""


def takes(kind: Kind, chip: Chip) -> bool:
    """Tell whether the kernel serves such heads and pages on a chip; prefill.cuh serves all."""
    return chip.capability == (9, 0) and kind.head_dim >= LEAST_DIM


@functools.cache
def prefill_source(kind: Kind, chip: Chip) -> KernelSource:
    """Return the kernel for rows of many new tokens that are in pages already, of a `Kind` that it takes."""
    block_pages, query_slots = _block_pages(kind), 2 if kind.head_dim <= 192 else 1
    raw_slots = (_RAW_SLOTS if kind.head_dim <= 192 else 1) if kind.e4m3 else 0
    slot, rest = _memory(kind, block_pages, query_slots * QUERIES, query_slots, raw_slots)
    slots = min((chip.shared_bytes - rest) // slot, _MOST_SLOTS)
    return KernelSource(
        name=f"tersor_attention_sm90_prefill_{kind.name}",
        header="attention/sm90_prefill.cuh",
        parameters={
            **kind.parameters,
            "GROUPS": _GROUPS,
            "BLOCK_PAGES": block_pages,
            "SLOTS": slots,
            "QUERY_SLOTS": query_slots,
            "RAW_SLOTS": raw_slots,
            "SHARED_BYTES": slots * slot + rest,
        },
        arguments="TPPPPPPPPPiiiiiiiff",
    )


SHARED_THREADS = 256
"""Of a CTA of sm90_shared.cuh."""
_SHARED_MOST_SLOTS, _SHARED_LEAST_SLOTS, _SHARED_RAW_SLOTS = 12, 4, 3


@functools.cache
def shared_source(kind: Kind, chip: Chip) -> KernelSource:
    """Return the kernel for pages that rows of one new token begin with, of a `Kind` that `takes` tells of."""
    raw_slots = _SHARED_RAW_SLOTS if kind.e4m3 else 0
    slot, rest = _memory(kind, 1, SHARED_QUERIES, 1, raw_slots)
    of_two, alone = stages_beside(chip, slot, rest, 2), (chip.shared_bytes - rest) // slot
    resident = 2 if of_two >= _SHARED_LEAST_SLOTS else 1
    slots = min(of_two if resident == 2 else alone, _SHARED_MOST_SLOTS)
    return KernelSource(
        name=f"tersor_attention_sm90_shared_{kind.name}",
        header="attention/sm90_shared.cuh",
        parameters={
            **kind.parameters,
            "GROUPS": 1,
            "BLOCK_PAGES": 1,
            "SLOTS": slots,
            "QUERY_SLOTS": 1,
            "RAW_SLOTS": raw_slots,
            "RESIDENT": resident,
            "SHARED_BYTES": slots * slot + rest,
        },
        arguments="TPPPPPPPPPPqiiiiiiiiiiffff",
    )


def map_of(kind: Kind, problem: Problem, pages_of_layer: int, page_count: int) -> bytes:
    """Return the tensor map of all tokens of pages, boxes of a page x 128 bytes; zeros where numbers are in e4m3."""
    if kind.e4m3:
        return bytes(_MAP_BYTES)
    tokens = page_count * 2 * problem.kv_heads * PAGE
    element = tensor_map.element(kind.dtype == "bfloat16")
    return tensor_map.rows(pages_of_layer, tokens, kind.head_dim, kind.head_dim, element, PAGE)


def _memory(kind: Kind, block_pages: int, queries: int, query_slots: int, raw_slots: int) -> tuple[int, int]:
    """Return bytes of shared memory, barriers included: of a slot of keys or values, and of all that is beside them.

    Args:
        kind: what the kernel is compiled for.
        block_pages: pages in a slot.
        queries: in all slots of queries.
        query_slots, raw_slots: of queries, and of keys or values in e4m3.
    """
    row = -(-kind.head_dim // 64) * 128
    raw = block_pages * PAGE * (kind.head_dim + 4) + _BARRIER_BYTES
    rest = queries * row + query_slots * _BARRIER_BYTES + raw_slots * raw + _LAST_BYTES
    return block_pages * PAGE * row + _BARRIER_BYTES, rest + _ITEM_SLOTS * (_ITEM_BYTES + _BARRIER_BYTES)


def _block_pages(kind: Kind) -> int:
    """Return pages whose keys meet queries at a time."""
    return 2 if kind.head_dim <= 128 else 1


@dataclass(frozen=True, slots=True)
class Grid:
    """How the kernel runs.

    Attributes:
        ctas: that take tiles, or parts of what they see, in turn.
        splits: most parts of a tile.
        floats, counters: float32 sums that parts exchange, and counters, zero between launches.
    """

    ctas: int
    splits: int
    floats: int
    counters: int


def grid_of(kind: Kind, problem: Problem, sms: int, splits: int | None = None) -> Grid:
    """Return how a problem runs on a GPU of so many SMs.

    Args:
        kind: what the kernel is compiled for.
        problem: what the host knows.
        sms: multiprocessors.
        splits: most parts of a tile, instead of as many as fill the GPU.
    """
    group = problem.heads // problem.kv_heads
    tiles = problem.tiles(QUERIES, group) * problem.kv_heads
    if splits is None:
        pages = max(problem.most_pages, 1)
        if problem.window is not None:
            pages = min(pages, (problem.window + QUERIES // group) // PAGE + 2)
        most = min(sms // tiles, pages // _block_pages(kind) // _LEAST_BLOCKS, _MOST_SPLITS)
        splits = 1 if problem.invariant else max(1, most)
    floats = 0 if splits == 1 else tiles * splits * QUERIES * (kind.head_dim + 8)
    return Grid(min(sms, tiles * splits), splits, floats, 1 + _GROUPS * tiles)


def prepare_prefill(function: Function, kind: Kind, problem: Problem, grid: Grid) -> PrefillLaunch:
    """Return what launches attention of the rows of many new tokens, which append.cuh has brought to pages.

    Args:
        function: `prefill_source` of this module, loaded.
        kind: what it is compiled for.
        problem: what the host knows.
        grid: of `grid_of`.
    """
    size, block = (grid.ctas, 1, 1), (_THREADS, 1, 1)
    shared, run = int(function.source.parameters["SHARED_BYTES"]), function.launch
    window, scale, soft = problem.scores

    def launch(
        *,
        stream: int,
        pages_of_layer: int,
        page_count: int,
        scales: int,
        starts: int,
        lengths: int,
        table: int,
        sinks: int,
        wide_sinks: bool,
        out: int,
        partial: int,
        taken: int,
        early: bool,
    ) -> None:
        """Launch; arguments are those of `kernels.decode_attention.prepare_decode`, and others.

        Args:
            page_count: how many pages there are.
            partial, taken: addresses of `Grid.floats`, a multiple of 16, and `Grid.counters`, zero again after.
        """
        pages = map_of(kind, problem, pages_of_layer, page_count)
        # fmt: off
        run(size, block, shared, stream, (
            pages, pages_of_layer, scales, starts, lengths, table, sinks, out, partial, taken, problem.rows,
            problem.table_stride, problem.heads, problem.kv_heads, window, wide_sinks, grid.splits, scale, soft,
        ), early)
        # fmt: on

    return launch
