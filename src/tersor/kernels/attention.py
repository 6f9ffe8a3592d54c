"""Attention over pages: append.cuh, then prefill.cuh, for rows of many new tokens, and what all its kernels are told.

`kernels.decode_attention` has decode.cuh for rows of few new tokens and, ahead of it, `kernels.shared_attention` what
some of them read together.

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
_APPEND_THREADS = 256
_APPEND_CTAS, _MOST_APPENDED = 2, 8
"""CTAs of append.cuh that an SM has before one takes several tokens, and how many at most."""
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
    both = stages_beside(chip, of_stage, rest, 2)
    return min(both, most) if both >= least else max(min((chip.shared_bytes - rest) // of_stage, least), 1)


def stages_beside(chip: Chip, of_stage: int, rest: int, ctas: int) -> int:
    """Return the most stages with which rings of so many CTAs, and the `rest` of their shared memory, fit an SM."""
    return (chip.shared_bytes - ctas * (_RESERVED + rest)) // (ctas * of_stage)


@functools.cache
def append_source(kind: Kind) -> KernelSource:
    """Return the kernel that brings new keys and values to pages, and makes queries ready."""
    return KernelSource(
        name=f"tersor_attention_append_{kind.name}",
        header="attention/append.cuh",
        parameters=kind.parameters,
        arguments="PPPPPPPPPPqiiiiiiff",
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
        arguments="PPPPPPPiiiiiiff",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What the host knows of a call.

    Attributes:
        rows, tokens: of the step.
        heads, kv_heads, rotary_dim, window, softcap, scale, eps, offset: of the form; `eps` and `offset` mean nothing
            without norms.
        most_queries, most_pages: bounds of the rows.
        table_stride: pages of a row in the table.
        invariant: whether a row's bits must not depend on the others.
        shares: whether some rows read pages together.
        most_few: bound of the new tokens of rows that have up to FEW_QUERIES.
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

    def tiles(self, queries: int, of_token: int = 1) -> int:
        """Return in how many tiles the rows of many new tokens are at most, 1 or more.

        Args:
            queries: of a tile, which has those of one row alone.
            of_token: queries of a new token.
        """
        of_row = -(-self.most_queries * of_token // queries)
        together = self.tokens * of_token // queries + min(self.rows, self.tokens // (FEW_QUERIES + 1))
        return max(1, min(self.rows * of_row, together))

    def query_tiles(self, kind: Kind) -> int:
        """Return `QUERY_TILES` of decode.cuh, that of any step where a row's bits must not depend on the others."""
        return kind.query_tiles(FEW_QUERIES * (self.heads // self.kv_heads) if self.invariant else self.shared_queries)


AppendLaunch: TypeAlias = Callable[..., None]
"""Launches append.cuh on one prepared problem: `launch` in `prepare_append`."""
PrefillLaunch: TypeAlias = Callable[..., None]
"""Launches prefill.cuh, or sm90_prefill.cuh, on one prepared problem: `launch` in their modules' `prepare_prefill`."""


def tokens_of_append(tokens: int, sms: int) -> int:
    """Return how many tokens a CTA of append.cuh has in turn, of so many in a step on a GPU of so many SMs."""
    return max(1, min(tokens // (_APPEND_CTAS * sms), _MOST_APPENDED))


def prepare_append(function: Function, problem: Problem, sms: int) -> AppendLaunch:
    """Return what launches append.cuh.

    Args:
        function: `append_source`, loaded.
        problem: what the host knows.
        sms: of the GPU.
    """
    each = tokens_of_append(problem.tokens, sms)
    size, block = (-(-problem.tokens // each), 1, 1), (_APPEND_THREADS, 1, 1)
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
        """Launch; arguments are those of `decode_attention.prepare_decode`."""
        # fmt: off
        run(size, block, 0, stream, (
            qkv, pages_of_layer, scales, starts, lengths, table, rotary, *norms, out, stride, problem.rows, each,
            problem.table_stride, problem.heads, problem.kv_heads, problem.rotary_dim, problem.eps, problem.offset,
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
    size, block = (problem.tiles(64 * int(parameters["ROW_TILES"])), problem.heads, 1), (32 * _WARPS, 1, 1)
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
        """Launch; arguments are those of `decode_attention.prepare_decode`."""
        # fmt: off
        run(size, block, shared, stream, (
            pages_of_layer, scales, starts, lengths, table, sinks, out, problem.rows, problem.table_stride,
            problem.heads, problem.kv_heads, window, wide_sinks, scale, soft,
        ), early)
        # fmt: on

    return launch
