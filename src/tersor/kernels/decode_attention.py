"""Attention over pages of rows of few new tokens: attention/decode.cuh.

As in `kernels.attention`: the kernel's source, its launch prepared for a problem, then the launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tersor.hardware import Chip
from tersor.kernels.attention import (
    FEW_QUERIES,
    INVARIANT_PAGES,
    PAGE,
    QUERIES,
    Kind,
    Problem,
    most_parts,
    stages,
    stages_beside,
)
from tersor.kernels.jit import Function, KernelSource

_WARPS = 4
_MOST_STAGES = 4
_MOST_SPLITS = 64
_CTAS_OF_SM = 2
_CROWD = 2
"""How many times the CTAs that fit a GPU are a crowd."""


@functools.cache
def decode_source(
    kind: Kind, query_tiles: int, chip: Chip, shares: bool = False, crowded: bool = False
) -> KernelSource:
    """Return the kernel for rows of few new tokens; its ring is as deep as the chip's shared memory allows.

    Args:
        kind: what all its kernels are compiled for.
        query_tiles: of `Problem.query_tiles`.
        chip: where it runs.
        shares: whether some rows read pages together.
        crowded: of `is_crowded`.
    """
    ctas, depth = _ring(kind, query_tiles, chip, shares or crowded)
    queries = QUERIES * query_tiles
    sums = 4 * _WARPS * queries * (kind.head_dim + 6)
    variant = "shares_" if shares else "crowded_" if ctas > _CTAS_OF_SM else ""
    return KernelSource(
        name=f"tersor_attention_decode_{query_tiles}_{variant}{kind.name}",
        header="attention/decode.cuh",
        parameters={
            **kind.parameters,
            "QUERY_TILES": query_tiles,
            "CTAS": ctas,
            "STAGES": depth,
            "SHARES": shares,
            "SHARED_BYTES": max(depth * _WARPS * kind.tokens_of_16, sums) + _rest(kind, query_tiles),
        },
        arguments="PPPPPPPPPPPPPPqiiiiiiiiiiiffff",
    )


def _rest(kind: Kind, query_tiles: int) -> int:
    """Return bytes of shared memory beside the ring: queries and new tokens."""
    return QUERIES * query_tiles * kind.query_stride + 2 * FEW_QUERIES * (kind.row_stride + 4)


def _ring(kind: Kind, query_tiles: int, chip: Chip, short: bool) -> tuple[int, int]:
    """Return the CTAs of an SM and the stages of their rings.

    Where CTAs are `short`, since many follow each other or others read pages for them, three on an SM hide more of how
    they begin and end than two with deeper rings, unless those have more pages under way. Registers allow three with
    one tile of queries.
    """
    of_stage, rest = _WARPS * kind.tokens_of_16, _rest(kind, query_tiles)
    depth = stages(chip, of_stage, rest, 2, _MOST_STAGES)
    of_three = min(stages_beside(chip, of_stage, rest, 3), depth)
    if short and query_tiles == 1 and 3 * of_three >= _CTAS_OF_SM * depth:
        return 3, of_three
    return _CTAS_OF_SM, depth


@dataclass(frozen=True, slots=True)
class Grid:
    """How decode.cuh runs.

    Attributes:
        splits: most parts of a row's text.
        items: parts of the queries that share keys.
        part_queries: queries of a split in what splits exchange.
        slots: parts of a row in what splits exchange: its splits, and as many as may be read together with others.
        floats, counters: float32 sums and counters that splits exchange; zero with one part.
    """

    splits: int
    items: int
    part_queries: int
    slots: int
    floats: int
    counters: int

    @staticmethod
    def of(kind: Kind, problem: Problem, splits: int) -> Grid:
        """Return how a problem runs in at most so many splits."""
        queries = QUERIES * problem.query_tiles(kind)
        items = -(-problem.shared_queries // queries)
        slots = splits + (most_parts(problem.rows) if problem.shares else 0)
        if slots == 1:
            return Grid(1, items, 0, 1, 0, 0)
        of_row = problem.heads // problem.kv_heads if problem.shares else problem.shared_queries
        groups, part_queries = problem.rows * problem.kv_heads * items, min(queries, of_row + 1) & ~1
        return Grid(splits, items, part_queries, slots, groups * slots * part_queries * (kind.head_dim + 2), groups)


def grid_of(kind: Kind, problem: Problem, sms: int) -> Grid:
    """Return how a problem runs on a GPU of so many SMs."""
    groups = problem.rows * problem.kv_heads * Grid.of(kind, problem, 1).items
    pages = max(problem.most_pages, 1)
    if problem.window is not None:  # pages that the tokens of a row of few can see
        pages = min(pages, -(-(problem.window + FEW_QUERIES) // PAGE) + 1)
    if problem.invariant:
        splits = -(-pages // INVARIANT_PAGES)
    elif problem.shares and problem.few > 1:  # parts have room for rows of one new token
        splits = 1
    else:
        splits = max(1, min(_CTAS_OF_SM * sms // groups, _MOST_SPLITS, pages))
    return Grid.of(kind, problem, splits)


def is_crowded(kind: Kind, rows: int, kv_heads: int, invariant: bool, sms: int) -> bool:
    """Tell whether so many CTAs of e4m3 pages follow each other that `decode_source` has more of them on an SM.

    CTAs of 16-bit pages are no faster then: they wait for memory alone. Where a row's bits must not depend on the
    others (`invariant`), any number of rows has one kernel.
    """
    return kind.e4m3 and not invariant and rows * kv_heads > _CROWD * _CTAS_OF_SM * sms


DecodeLaunch: TypeAlias = Callable[..., None]
"""Launches decode.cuh on one prepared problem: `launch` in `prepare_decode`."""


def prepare_decode(function: Function, problem: Problem, grid: Grid) -> DecodeLaunch:
    """Return what launches attention of the rows of few new tokens, and writes zeros for padding.

    Args:
        function: `decode_source`, loaded.
        problem: what the host knows.
        grid: of `grid_of`.
    """
    size, block = (grid.splits, problem.kv_heads * grid.items, problem.rows), (32 * _WARPS, 1, 1)
    shared_bytes, run = int(function.source.parameters["SHARED_BYTES"]), function.launch
    window, scale, soft = problem.scores
    pages = INVARIANT_PAGES if problem.invariant else 0

    def launch(
        *,
        stream: int,
        qkv: int,
        stride: int,
        pages_of_layer: int,
        scales: int,
        starts: int,
        lengths: int,
        table: int,
        rotary: int,
        norms: tuple[int, int],
        sinks: int,
        wide_sinks: bool,
        out: int,
        partial: int,
        arrived: int,
        shared: int,
        settled: bool,
        early: bool,
    ) -> None:
        """Launch; what is not there has the address 0.

        Args:
            stream: handle of the stream.
            qkv, stride: address of [tokens, (heads + 2 kv heads) * head_dim], and elements from a token to the next.
            pages_of_layer, scales: addresses of the pages and of what their e4m3 numbers are multiplied with.
            starts, lengths, table: addresses of `Rows`.
            rotary, norms: addresses of the float32 table, and of the weights for queries and keys.
            sinks, wide_sinks: address, and whether they are float32.
            out: address of [tokens, heads * head_dim].
            partial, arrived: addresses of `Grid.floats` and `Grid.counters`, these zero, which they are again after.
            shared: address of `Rows.shared`, whose parts are in `partial` already.
            settled: as in `Rows`.
            early: whether the kernel may start before the one ahead has ended.
        """
        # fmt: off
        arguments = (
            qkv, pages_of_layer, scales, starts, lengths, table, rotary, *norms, sinks, out, partial, arrived, shared,
            stride, problem.table_stride, problem.tokens, problem.heads, problem.kv_heads, problem.rotary_dim, window,
            wide_sinks, settled, grid.part_queries, pages, grid.slots, scale, soft, problem.eps, problem.offset,
        )
        # fmt: on
        run(size, block, shared_bytes, stream, arguments, early)

    return launch
