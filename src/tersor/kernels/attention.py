"""Attention over pages: attention/decode.cuh for rows of few new tokens; append.cuh, then prefill.cuh, for the others.
Ahead of decode.cuh, what some of its rows read together (`kernels.shared_attention`).

On compute capability 9.0 `kernels.attention_sm90` has another kernel in place of prefill.cuh.

As in `kernels.dense`: a kernel's source, its launch prepared for a problem, then the launch, by addresses and sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tersor.hardware import Chip
from tersor.kernels.jit import Function, KernelSource

PAGE = 64
"""Tokens of a page."""
FEW_QUERIES = 8
"""New tokens of a row up to which decode.cuh serves it."""
MOST_DIM = 256
INVARIANT_PAGES = 8
"""Pages of a split where a row's bits do not depend on the batch."""
SHARED_QUERIES = 64
"""Queries of one head of keys that read pages together at most: rows that share pages, times heads that share keys."""

_WARPS = 4
_TILE = 16
"""Tokens that a warp of decode.cuh multiplies at a time."""
QUERIES = 8
"""Columns of its products."""
_MOST_STAGES = 4
_MOST_SPLITS = 64
_CTAS_OF_SM = 2
_NEXT = 16
"""Bytes of shared memory by which the threads of a CTA of decode.cuh learn what is next."""
_APPEND_THREADS, _APPEND_TOKENS = 256, 4
_LOG2E = math.log2(math.e)
_RESERVED = 1024
"""Bytes of shared memory that the driver takes from every CTA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What attention kernels are compiled for.

    Attributes:
        head_dim: channels of a head, a multiple of 16 up to MOST_DIM.
        dtype: of activations, `float16` or `bfloat16`.
        e4m3: whether pages hold e4m3 numbers with scales; otherwise they hold numbers of `dtype`.
    """

    head_dim: int
    dtype: str
    e4m3: bool = False

    @property
    def name(self) -> str:
        """The end of a kernel's name."""
        return f"{self.head_dim}_{self.dtype}" + ("_e4m3" if self.e4m3 else "")

    @property
    def parameters(self) -> dict[str, int | bool | str]:
        """Macros that all attention headers read."""
        return {"HEAD_DIM": self.head_dim, "BF16": self.dtype == "bfloat16", "E4M3": self.e4m3}

    @property
    def row_stride(self) -> int:
        """Bytes of a token's keys or values in shared memory: an odd number of 16."""
        return (self.head_dim * (1 if self.e4m3 else 2) // 16 | 1) * 16

    @property
    def query_stride(self) -> int:
        """Bytes of a query there."""
        return (self.head_dim // 8 | 1) * 16

    @property
    def tokens_of_16(self) -> int:
        """Bytes of 16 tokens' keys and values there, with their scales."""
        return 2 * _TILE * (self.row_stride + (4 if self.e4m3 else 0))

    def query_tiles(self, queries: int) -> int:
        """Return how many times 8 queries a CTA of decode.cuh takes, of so many that share keys."""
        if queries <= QUERIES:
            return 1
        return 2 if queries <= 2 * QUERIES or self.head_dim > 128 else 4

    @property
    def row_tiles(self) -> int:
        """How many times 64 queries a CTA of prefill.cuh takes."""
        return 2 if self.head_dim <= 128 else 1


def most_parts(rows: int) -> int:
    """Return in how many parts the pages that a row shares with others are read at most, in a step of so many rows."""
    return max(4, min(1024 // rows, 32))


def stages(chip: Chip, of_stage: int, rest: int, least: int, most: int) -> int:
    """Return the stages of a ring so that two CTAs fit an SM or, where those would have fewer than `least`, one."""
    both = (chip.shared_bytes - 2 * _RESERVED - 2 * rest) // (2 * of_stage)
    alone = (chip.shared_bytes - rest) // of_stage
    return min(both, most) if both >= least else max(min(alone, least), 1)


def _decode_rest(kind: Kind, query_tiles: int) -> int:
    return QUERIES * query_tiles * kind.query_stride + 2 * FEW_QUERIES * (kind.row_stride + 4)


def _decode_sums(kind: Kind, query_tiles: int) -> int:
    return 4 * _WARPS * QUERIES * query_tiles * (kind.head_dim + 6)


def decode_room(kind: Kind, query_tiles: int, chip: Chip) -> tuple[int, int, bool]:
    """Return the CTAs of an SM that decode.cuh runs in, the stages of their rings, and whether they take items in turn.

    Then sums have a place beside the ring. CTAs do where as many of them have two stages of it then, or all that there
    were, and where registers hold what they have to know of the next item: with one tile of queries.
    """
    of_stage, rest = _WARPS * kind.tokens_of_16, _decode_rest(kind, query_tiles)

    def room(beside: int) -> tuple[int, int]:
        depth = stages(chip, of_stage, beside, 2, _MOST_STAGES)
        ctas = (chip.shared_bytes + _RESERVED) // (depth * of_stage + beside + _RESERVED)
        return min(ctas, _CTAS_OF_SM), depth

    once, turns = room(rest), room(rest + _decode_sums(kind, query_tiles) + _NEXT)
    if query_tiles == 1 and turns[0] == once[0] and turns[1] >= min(once[1], 2):
        return *turns, True
    return *once, False


@functools.cache
def decode_source(kind: Kind, query_tiles: int, chip: Chip, shares: bool = False) -> KernelSource:
    """Return the kernel for rows of few new tokens; its ring is as deep as the chip's shared memory allows.

    Args:
        kind: what all its kernels are compiled for.
        query_tiles: of `Problem.query_tiles`.
        chip: where it runs.
        shares: whether some rows read pages together.
    """
    rest, sums = _decode_rest(kind, query_tiles), _decode_sums(kind, query_tiles)
    ctas, depth, turns = decode_room(kind, query_tiles, chip)
    ring = depth * _WARPS * kind.tokens_of_16
    return KernelSource(
        name=f"tersor_attention_decode_{query_tiles}_{'shares_' if shares else ''}{kind.name}",
        header="attention/decode.cuh",
        parameters={
            **kind.parameters,
            "QUERY_TILES": query_tiles,
            "CTAS": ctas,
            "STAGES": depth,
            "SHARES": shares,
            "TURNS": turns,
            "SHARED_BYTES": (ring + sums + _NEXT if turns else max(ring, sums)) + rest,
        },
        arguments="PPPPPPPPPPPPPPqiiiiiiiiiiiiiiiffff",
    )


@functools.cache
def append_source(kind: Kind) -> KernelSource:
    """Return the kernel that brings new keys and values to pages, and makes queries ready."""
    return KernelSource(
        name=f"tersor_attention_append_{kind.name}",
        header="attention/append.cuh",
        parameters=kind.parameters,
        arguments="PPPPPPPPPPqiiiiff",
    )


@functools.cache
def prefill_source(kind: Kind, chip: Chip) -> KernelSource:
    """Return the kernel for rows of many new tokens that are in pages already."""
    rest = 64 * kind.row_tiles * kind.query_stride
    of_stage = 2 * PAGE * (kind.row_stride + (4 if kind.e4m3 else 0))
    depth = stages(chip, of_stage, rest, 1, 2)
    return KernelSource(
        name=f"tersor_attention_prefill_{kind.name}",
        header="attention/prefill.cuh",
        parameters={
            **kind.parameters,
            "ROW_TILES": kind.row_tiles,
            "PAGE_PARTS": 2 if kind.row_tiles == 2 and kind.head_dim > 96 else 1,
            "STAGES": depth,
            "SHARED_BYTES": depth * of_stage + rest,
        },
        arguments="PPPPPPPiiiiiff",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What the host knows of a call.

    Attributes:
        rows, tokens: of the step.
        heads, kv_heads, rotary_dim, window, softcap, scale, eps, offset: of the form; `eps` and `offset` mean nothing
            without norms.
        most_queries, most_pages: bounds of the rows.
        most_few: bound of the new tokens of rows that have up to FEW_QUERIES.
        table_stride: pages of a row in the table.
        invariant: whether a row's bits must not depend on the others.
        shares: whether some rows read pages together.
    """

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    rotary_dim: int
    window: int | None
    softcap: float | None
    scale: float
    eps: float
    offset: float
    most_queries: int
    most_pages: int
    table_stride: int
    invariant: bool
    shares: bool = False
    most_few: int = FEW_QUERIES

    @property
    def scores(self) -> tuple[int, float, float]:
        """Window, factor of products, and softcap in powers of two (0: none), as kernels take them."""
        window = 2**31 - 1 if self.window is None else min(self.window, 2**31 - 1)
        if self.softcap is None:
            return window, self.scale * _LOG2E, 0.0
        return window, self.scale / self.softcap, self.softcap * _LOG2E

    @property
    def few(self) -> int:
        """Most new tokens of a row of few."""
        return min(self.most_few, self.most_queries, FEW_QUERIES)

    @property
    def shared_queries(self) -> int:
        """Most queries of a row of few tokens that share keys."""
        return self.few * (self.heads // self.kv_heads)

    def query_tiles(self, kind: Kind) -> int:
        """Return `QUERY_TILES` of decode.cuh, that of any step where a row's bits must not depend on the others."""
        return kind.query_tiles(FEW_QUERIES * (self.heads // self.kv_heads) if self.invariant else self.shared_queries)


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


DecodeLaunch: TypeAlias = Callable[..., None]
"""Launches decode.cuh on one prepared problem: `launch` in `prepare_decode`."""
AppendLaunch: TypeAlias = Callable[..., None]
"""Launches append.cuh on one prepared problem: `launch` in `prepare_append`."""
PrefillLaunch: TypeAlias = Callable[..., None]
"""Launches prefill.cuh, or sm90_prefill.cuh, on one prepared problem: `launch` in their modules' `prepare_prefill`."""


def ctas_in_turn(source: KernelSource, problem: Problem, grid: Grid, sms: int) -> int:
    """Return how many CTAs of decode.cuh take items in turn, on so many SMs; 0 where every item has one of its own."""
    ctas = int(source.parameters["CTAS"]) * sms
    items = grid.splits * problem.kv_heads * grid.items * problem.rows
    return ctas if source.parameters["TURNS"] and items > ctas else 0


def prepare_decode(function: Function, problem: Problem, grid: Grid, ctas: int = 0) -> DecodeLaunch:
    """Return what launches attention of the rows of few new tokens, and writes zeros for padding.

    Args:
        function: `decode_source`, loaded.
        problem: what the host knows.
        grid: of `grid_of`.
        ctas: of `ctas_in_turn`.
    """
    row_items = problem.kv_heads * grid.items
    size, block = (ctas, 1, 1) if ctas else (grid.splits, row_items, problem.rows), (32 * _WARPS, 1, 1)
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
            wide_sinks, settled, grid.part_queries, pages, grid.slots, grid.splits, row_items, problem.rows, ctas > 0,
            scale, soft, problem.eps, problem.offset,
        )
        # fmt: on
        run(size, block, shared_bytes, stream, arguments, early)

    return launch


def prepare_append(function: Function, problem: Problem) -> AppendLaunch:
    """Return what launches append.cuh.

    Args:
        function: `append_source`, loaded.
        problem: what the host knows.
    """
    size, block = (-(-problem.most_queries // _APPEND_TOKENS), problem.rows, 1), (_APPEND_THREADS, 1, 1)
    run = function.launch

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
        out: int,
        early: bool,
    ) -> None:
        """Launch; arguments are those of `prepare_decode`."""
        # fmt: off
        run(size, block, 0, stream, (
            qkv, pages_of_layer, scales, starts, lengths, table, rotary, *norms, out, stride, problem.table_stride,
            problem.heads, problem.kv_heads, problem.rotary_dim, problem.eps, problem.offset,
        ), early)
        # fmt: on

    return launch


def prepare_prefill(function: Function, problem: Problem) -> PrefillLaunch:
    """Return what launches attention of the rows of many new tokens, which append.cuh has brought to pages.

    Args:
        function: `prefill_source`, loaded.
        problem: what the host knows.
    """
    parameters = function.source.parameters
    tiles = -(-problem.most_queries // (64 * int(parameters["ROW_TILES"])))
    size, block = (tiles, problem.heads, problem.rows), (32 * _WARPS, 1, 1)
    shared, run = int(parameters["SHARED_BYTES"]), function.launch
    window, scale, soft = problem.scores

    def launch(
        *,
        stream: int,
        pages_of_layer: int,
        scales: int,
        starts: int,
        lengths: int,
        table: int,
        sinks: int,
        wide_sinks: bool,
        out: int,
        early: bool,
    ) -> None:
        """Launch; arguments are those of `prepare_decode`."""
        # fmt: off
        run(size, block, shared, stream, (
            pages_of_layer, scales, starts, lengths, table, sinks, out, problem.table_stride, problem.heads,
            problem.kv_heads, window, wide_sinks, scale, soft,
        ), early)
        # fmt: on

    return launch
