"""Between the products of a decoder, beside norms (`kernels.norms`): small/rows.cuh copies those that an index names,
small/pointwise.cuh makes a number of another or of two, small/heads.cuh and small/trim.cuh stand around attention with
latent vectors, small/resolve.cuh and small/keep.cuh are the first and the last of a step, and small/all_reduce.cuh adds
up what several GPUs have.

As in `kernels.routing`: a kernel's source, its launch prepared for a problem, then the launch, by addresses and sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

from tersor.kernels.jit import Function, KernelSource

CHANNELS = 8
"""Rows have a multiple of so many channels and start on 16 bytes."""
MOST_CHANNELS = 16384
"""Of a row that is normalised."""

MOST_RANKS = 8
"""GPUs that add up a tensor in one step."""
MOST_REDUCED = 1 << 20
"""Bytes of a tensor that is added up in one step."""
ALL_REDUCE_CTAS = 32
"""CTAs of that kernel, each with a count of calls."""
ALL_REDUCE_BYTES = 4096 + 2 * MOST_REDUCED
"""Of the buffer that peers read and write, zero at first."""

_NORM_THREADS = 512
_ROWS_THREADS = 256
_ALL_REDUCE_THREADS = 512
_TOKEN_THREADS = 256
_PIECE_THREADS = 256


def norm_pieces(channels: int) -> int:
    """Return how many pieces of a row a thread that normalises has at most: 1, 2 or 4."""
    return next(count for count in (1, 2, 4) if channels <= CHANNELS * _NORM_THREADS * count)


def norm_threads(channels: int) -> int:
    """Return the threads of a CTA that normalises a row; the order of sums depends on them."""
    return _threads(-(-channels // (CHANNELS * norm_pieces(channels))), _NORM_THREADS)


@functools.cache
def rows_source(target: str, index64: bool, positions: bool) -> KernelSource:
    """Return the kernel that copies rows of a 16-bit dtype.

    Args:
        target: `float16` or `bfloat16`.
        index64: whether the index is int64; else it is int32.
        positions: whether a second table has a row for every position in a text.
    """
    return KernelSource(
        name=f"tersor_rows_{target}_{'int64' if index64 else 'int32'}{'_positions' * positions}",
        header="small/rows.cuh",
        parameters={"BF16": target == "bfloat16", "INDEX64": index64, "POSITIONS": positions},
        arguments="PPPPPPiiiiif",
    )


@functools.cache
def pointwise_source(target: str, gate: int, softcap: bool) -> KernelSource:
    """Return the kernel that makes one of gate and up, or, without a gate, caps numbers or has none below 0.

    Args:
        target: `float16` or `bfloat16`.
        gate: EPILOGUE of cuda/common/gate.cuh: how gate and up become one, or 0.
        softcap: whether numbers are capped.
    """
    return KernelSource(
        name=f"tersor_{f'gate_{gate}' if gate else 'softcap' if softcap else 'relu'}_{target}",
        header="small/pointwise.cuh",
        parameters={"BF16": target == "bfloat16", "EPILOGUE": gate, "SOFTCAP": softcap},
        arguments="PPiif",
    )


@functools.cache
def heads_source(interleaved: bool) -> KernelSource:
    """Return the kernel that puts heads of latent vectors side by side.

    Args:
        interleaved: whether partners of a rotation stand side by side, and come apart.
    """
    return KernelSource(
        name=f"tersor_heads{'_interleaved' * interleaved}",
        header="small/heads.cuh",
        parameters={"INTERLEAVED": interleaved},
        arguments="PPPPqqqiiiii",
    )


def trim_source() -> KernelSource:
    """Return the kernel that copies the first channels of every head."""
    return _TRIM


def resolve_source() -> KernelSource:
    """Return the kernel that looks up the tokens of a step."""
    return _RESOLVE


def keep_source() -> KernelSource:
    """Return the kernel that keeps the tokens which a step drew."""
    return _KEEP


_RESOLVE = KernelSource(name="tersor_resolve", header="small/resolve.cuh", parameters={}, arguments="PPPPPPPiii")
_TRIM = KernelSource(name="tersor_trim", header="small/trim.cuh", parameters={}, arguments="PPiii")
_KEEP = KernelSource(name="tersor_keep", header="small/keep.cuh", parameters={}, arguments="PPPi")


@functools.cache
def all_reduce_source(target: str, ranks: int) -> KernelSource:
    """Return the kernel that adds up a tensor of several GPUs.

    Args:
        target: `float16` or `bfloat16`.
        ranks: GPUs, at most `MOST_RANKS`.
    """
    return KernelSource(
        name=f"tersor_all_reduce_{target}_{ranks}",
        header="small/all_reduce.cuh",
        parameters={
            "BF16": target == "bfloat16",
            "RANKS": ranks,
            "CTAS": ALL_REDUCE_CTAS,
            "SLOT_BYTES": MOST_REDUCED,
        },
        arguments="PPPPii",
    )


def sources(target: str) -> list[KernelSource]:
    """Return all of them for rows of a dtype."""
    wide, learned = (False, True), (False, True)
    copies = [rows_source(target, index64, positions) for index64 in wide for positions in learned]
    numbers = [pointwise_source(target, gate, False) for gate in range(5)] + [pointwise_source(target, 0, True)]
    heads = [heads_source(False), heads_source(True), trim_source()]
    return [*copies, *numbers, *heads, resolve_source(), keep_source()]


RowsLaunch: TypeAlias = Callable[..., None]
"""Launches a copy of rows on one prepared problem: `launch` in `prepare_rows`."""
PointwiseLaunch: TypeAlias = Callable[..., None]
"""Launches what makes numbers of numbers on one prepared problem: `launch` in `prepare_pointwise`."""
HeadsLaunch: TypeAlias = Callable[..., None]
"""Launches what arranges heads on one prepared problem: `launch` in `prepare_heads` and `prepare_trim`."""
TokensLaunch: TypeAlias = Callable[..., None]
"""Launches what looks tokens up, or keeps them, on one prepared problem: `launch` in the functions below."""
AllReduceLaunch: TypeAlias = Callable[..., None]
"""Launches a sum over ranks: `launch` in `prepare_all_reduce`."""


def _threads(pieces: int, most: int) -> int:
    """Return whole warps for so many pieces, at most `most` threads."""
    return min(-(-pieces // 32) * 32, most)


def prepare_rows(
    function: Function, *, rows: int, channels: int, table_rows: int, position_rows: int, first: int, texts: int,
    scale: float,
) -> RowsLaunch:  # fmt: skip
    """Return what launches the copy of `rows` rows, at least one.

    Args:
        function: `rows_source`, loaded.
        rows, channels: sizes.
        table_rows, position_rows: rows of the tables.
        first: row of the second table that has position 0.
        texts: how many the rows belong to.
        scale: multiplies rows of the first table.
    """
    grid, block = (rows, 1, 1), (_threads(channels // CHANNELS, _ROWS_THREADS), 1, 1)
    sizes, run = (table_rows, position_rows, first, texts, channels, scale), function.launch

    def launch(
        *, stream: int, index: int, table: int, positions: int, starts: int, lengths: int, out: int, early: bool
    ) -> None:
        """Launch; what is not there has the address 0.

        Args:
            stream: handle of the stream.
            index: address of [rows] integers.
            table, positions, out: addresses of rows.
            starts, lengths: addresses of int32 [texts + 1] and [texts].
            early: as in `prepare_norm`.
        """
        run(grid, block, 0, stream, (index, table, positions, starts, lengths, out, *sizes), early)

    return launch


def prepare_pointwise(function: Function, *, rows: int, channels: int, cap: float) -> PointwiseLaunch:
    """Return what launches a gate, relu or soft cap of `rows` rows, at least one.

    Args:
        function: `pointwise_source`, loaded.
        rows, channels: of the result.
        cap: of a soft cap.
    """
    count = rows * (channels // CHANNELS)
    (grid, block), run = _of_pieces(count), function.launch
    sizes = (channels // CHANNELS, count, cap)

    def launch(*, stream: int, x: int, out: int, early: bool) -> None:
        """Launch.

        Args:
            stream: handle of the stream.
            x: address of [rows, channels], with a gate [rows, 2 channels].
            out: address of [rows, channels].
            early: as in `prepare_norm`.
        """
        run(grid, block, 0, stream, (x, out, *sizes), early)

    return launch


def _of_pieces(count: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return grid and block for a thread a piece."""
    return (-(-count // _PIECE_THREADS), 1, 1), (_PIECE_THREADS, 1, 1)


def prepare_heads(function: Function, *, tokens: int, heads: int, fixed: int, turned: int, value: int) -> HeadsLaunch:
    """Return what launches the arrangement of the heads of `tokens` tokens, at least one.

    Args:
        function: `heads_source`, loaded.
        tokens: how many.
        heads, fixed, turned, value: as in `ops.heads.LatentHeads`; multiples of 8 channels, of those that turn of 16.
    """
    count = tokens * 3 * heads * (fixed + turned) // CHANNELS
    (grid, block), run, sizes = _of_pieces(count), function.launch, (count, heads, fixed, turned, value)

    def launch(
        *, stream: int, queries: int, both: int, turning: int, out: int, strides: tuple[int, int, int], early: bool
    ) -> None:
        """Launch; addresses are those of `ops.heads.side_by_side`, each with elements from one token to the next."""
        run(grid, block, 0, stream, (queries, both, turning, out, *strides, *sizes), early)

    return launch


def prepare_trim(function: Function, *, heads: int, width: int, kept: int) -> HeadsLaunch:
    """Return what launches the copy of the first `kept` of the `width` channels of `heads` heads, at least one."""
    count = heads * kept // CHANNELS
    (grid, block), run, sizes = _of_pieces(count), function.launch, (count, width // CHANNELS, kept // CHANNELS)

    def launch(*, stream: int, x: int, out: int, early: bool) -> None:
        """Launch with addresses of [heads, width] and [heads, kept]; early as in `prepare_norm`."""
        run(grid, block, 0, stream, (x, out, *sizes), early)

    return launch


def prepare_resolve(function: Function, *, tokens: int, texts: int, draws: int) -> TokensLaunch:
    """Return what launches the lookup of `tokens` tokens, at least one, of at least one text, `draws` of which draw."""
    grid, block, run = (-(-max(tokens, draws) // _TOKEN_THREADS), 1, 1), (_TOKEN_THREADS, 1, 1), function.launch

    def launch(
        *, stream: int, tokens_of_step: int, newest: int, starts: int, lengths: int, places: int, found: int,
        drawn_lengths: int, early: bool,
    ) -> None:  # fmt: skip
        """Launch; addresses are those of `ops.resolve`'s arguments and results, early as in `prepare_norm`."""
        addresses = (tokens_of_step, newest, starts, lengths, places, found, drawn_lengths)
        run(grid, block, 0, stream, (*addresses, tokens, texts, draws), early)

    return launch


def prepare_keep(function: Function, *, draws: int) -> TokensLaunch:
    """Return what launches the keeping of `draws` tokens, at least one."""
    grid, block, run = (-(-draws // _TOKEN_THREADS), 1, 1), (_TOKEN_THREADS, 1, 1), function.launch

    def launch(*, stream: int, drawn: int, slots: int, newest: int, early: bool) -> None:
        """Launch; addresses are those of `ops.keep`'s arguments, early as in `prepare_norm`."""
        run(grid, block, 0, stream, (drawn, slots, newest, draws), early)

    return launch


def prepare_all_reduce(function: Function, *, rank: int, buffers: int, calls: int, ended: int) -> AllReduceLaunch:
    """Return what launches the sum of a tensor over all ranks.

    Args:
        function: `all_reduce_source`, loaded.
        rank: which this is.
        buffers: address of the addresses of all ranks' buffers, in order.
        calls: address of uint32 [ALL_REDUCE_CTAS + 1], zero at first; the last one ends all waiting when it is not 0.
        ended: address of a uint32 in pinned memory of the host, which does so too.
    """
    grid, block, run = (ALL_REDUCE_CTAS, 1, 1), (_ALL_REDUCE_THREADS, 1, 1), function.launch

    def launch(*, stream: int, x: int, nbytes: int, early: bool) -> None:
        """Launch; all ranks do so in the same order.

        Args:
            stream: handle of the stream.
            x: address of the tensor, which starts on 16 bytes and becomes the sum.
            nbytes: its size, whole 16 bytes.
            early: as in `prepare_norm`.
        """
        run(grid, block, 0, stream, (x, buffers, calls, ended, rank, nbytes // 16), early)

    return launch
