"""Drawing tokens: sampling/adjust.cuh, peaks.cuh, then weigh.cuh and choose.cuh for filtered rows; logprobs.cuh beside.

As in `kernels.routing`: a kernel's source, its launch prepared for a problem, then the launch, by addresses and sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tersor.kernels.jit import Function, KernelSource

INPUTS = {"float16": 0, "bfloat16": 1, "float32": 2}
"""Dtypes of logits -> `INPUT` of row.cuh."""

MOST_VOCABULARY = 1 << 18
"""Of a row: logprobs.cuh has room for the candidates of so many."""
CHUNK = 8
"""Logits that a thread has at a time."""

_ADJUST_THREADS = 256
_PEAKS_THREADS = 128
_SLICE = _PEAKS_THREADS * CHUNK
_GROUP_LANES = 8
_CHOOSE_THREADS = 512
_CHOOSE_SLICE = _CHOOSE_THREADS * CHUNK
_CANDIDATES = 16 * _CHOOSE_THREADS
_BINS = 1 << 11
_STATE_BYTES = 64
_LOGPROBS_THREADS = 1024


@functools.cache
def adjust_source(dtype: str) -> KernelSource:
    """Return the kernel that takes listed tokens' logits of a dtype from their rows, and penalises them."""
    return _source("adjust", dtype, "PPPPPPPPPPPPPPPPqii")


@functools.cache
def peaks_source(dtype: str) -> KernelSource:
    """Return the kernel that draws tokens of rows that are not filtered, from logits of a dtype."""
    return _source("peaks", dtype, "PPPPPPPPPPPPPPPPPPPPPqiii")


@functools.cache
def weigh_source(dtype: str) -> KernelSource:
    """Return the kernel that sums the weights of rows with top-p, from logits of a dtype."""
    return _source("weigh", dtype, "PPPPPPPPPPPPqiii")


@functools.cache
def choose_source(dtype: str) -> KernelSource:
    """Return the kernel that draws tokens of rows that are filtered, from logits of a dtype."""
    return _source("choose", dtype, "PPPPPPPPPPPPPPPPPPqiii")


@functools.cache
def logprobs_source(dtype: str) -> KernelSource:
    """Return the kernel that finds log probabilities, of logits of a dtype."""
    return _source("logprobs", dtype, "PPPPPPPPPPPPPPqiiii")


def sources(dtype: str) -> list[KernelSource]:
    """Return all of them for logits of a dtype: what a start compiles side by side."""
    return [kind(dtype) for kind in (choose_source, weigh_source, peaks_source, adjust_source, logprobs_source)]


def _source(kind: str, dtype: str, arguments: str) -> KernelSource:
    return KernelSource(
        name=f"tersor_sampling_{kind}_{dtype}",
        header=f"sampling/{kind}.cuh",
        parameters={"INPUT": INPUTS[dtype]},
        arguments=arguments,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """Where a draw keeps what its kernels tell each other: bytes from the start of one piece of memory, on 16 bytes.

    Attributes:
        states, partial, groups, weights, candidates, placed, values: places of what the headers call so.
        nbytes: of all.
    """

    states: int
    partial: int
    groups: int
    weights: int
    candidates: int
    placed: int
    values: int
    nbytes: int

    @staticmethod
    @functools.lru_cache(1024)
    def of(rows: int, vocabulary: int, listed: int, filters: bool) -> Scratch:
        """Return the places for `rows` rows and a list of `listed` tokens; those of filters only with them."""
        slices = -(-vocabulary // _SLICE)
        groups = _PEAKS_THREADS // _GROUP_LANES
        sizes = {
            "states": _STATE_BYTES * rows,
            "partial": 8 * rows * slices,
            "groups": 4 * rows * slices * groups,
            "weights": 8 * rows * _BINS * filters,
            "candidates": 8 * rows * _CANDIDATES * filters,
            "placed": 4 * listed,
            "values": 4 * listed,
        }
        places, end = {}, 0
        for name, size in sizes.items():
            places[name] = end
            end += -(-size // 16) * 16
        return Scratch(nbytes=end, **places)


Launch: TypeAlias = Callable[..., None]
"""Launches one kernel of sampling on a prepared problem: `launch` in the functions below."""


def prepare_adjust(function: Function, *, rows: int, vocabulary: int, words: int) -> Launch:
    """Return what launches `adjust_source` for `rows` rows, at least one.

    Args:
        function: the kernel, loaded.
        rows, vocabulary: sizes of the logits.
        words: of a row of bits; 0 where there are none.
    """
    grid, block, run = (rows, 1, 1), (_ADJUST_THREADS, 1, 1), function.launch

    def launch(
        *, stream: int, logits: int, stride: int, listed: tuple[int, ...], allowed: tuple[int, int], placed: int,
        values: int, early: bool,
    ) -> None:  # fmt: skip
        """Launch; what is not there has the address 0.

        Args:
            stream: handle of the stream.
            logits, stride: address, and elements from row to row.
            listed: addresses of slots, starts, ends, tokens, counts, biases, newest, pending, repetition, presence and
                frequency.
            allowed: addresses of bits, and of the rows of bits that rows have.
            placed, values: addresses of the list that the kernel makes.
            early: whether the kernel may start before the one ahead has ended: it waits before it reads or writes.
        """
        run(grid, block, 0, stream, (logits, *listed, *allowed, placed, values, stride, vocabulary, words), early)

    return launch


def prepare_peaks(function: Function, *, rows: int, vocabulary: int, words: int, aligned: bool) -> Launch:
    """Return what launches `peaks_source`; arguments as in `prepare_adjust`, and whether chunks start on 16 bytes."""
    slices = -(-vocabulary // _SLICE)
    grid, block, run = (slices, rows, 1), (_PEAKS_THREADS, 1, 1), function.launch

    def launch(
        *, stream: int, logits: int, stride: int, row: tuple[int, ...], options: tuple[int, ...], partial: int,
        groups: int, arrived: int, states: int, weights: int, out: tuple[int, int], early: bool,
    ) -> None:  # fmt: skip
        """Launch; what is not there has the address 0.

        Args:
            stream, logits, stride, early: as in `prepare_adjust`.
            row: addresses of slots, starts, ends, placed, values, bits and rows of bits.
            options: addresses of temperature, top_k, top_p, min_p, seeds and positions.
            partial, groups, states, weights: addresses in the scratch.
            arrived: address of a counter a row, zero before and after.
            out: addresses of int64 [rows] and, for the same tokens, of a place a slot.
        """
        sizes = (stride, vocabulary, words, aligned)
        scratch = (partial, groups, arrived, states, weights)
        run(grid, block, 0, stream, (logits, *row, *options, *scratch, *out, *sizes), early)

    return launch


def _ctas(rows: int, vocabulary: int, multiprocessors: int) -> int:
    """Return how many share a row: two of all fit a multiprocessor."""
    return min(max(2 * multiprocessors // rows, 1), -(-vocabulary // _CHOOSE_SLICE))


def prepare_weigh(
    function: Function, *, rows: int, vocabulary: int, words: int, aligned: bool, multiprocessors: int
) -> Launch:
    """Return what launches `weigh_source`; arguments as in `prepare_peaks`, and how many multiprocessors there are."""
    ctas = _ctas(rows, vocabulary, multiprocessors)
    grid, block, run = (ctas, rows, 1), (_CHOOSE_THREADS, 1, 1), function.launch

    def launch(
        *, stream: int, logits: int, stride: int, row: tuple[int, ...], options: tuple[int, ...], states: int,
        weights: int, early: bool,
    ) -> None:  # fmt: skip
        """Launch; arguments as in `prepare_peaks`, and the address of the weights in the scratch."""
        sizes, (temperature, _, top_p, *_) = (stride, vocabulary, words, aligned), options
        run(grid, block, 0, stream, (logits, *row, temperature, top_p, states, weights, *sizes), early)

    return launch


def prepare_choose(
    function: Function, *, rows: int, vocabulary: int, words: int, aligned: bool, multiprocessors: int
) -> Launch:
    """Return what launches `choose_source`; arguments as in `prepare_weigh`."""
    ctas = _ctas(rows, vocabulary, multiprocessors)
    grid, block, run = (ctas, rows, 1), (_CHOOSE_THREADS, 1, 1), function.launch

    def launch(
        *, stream: int, logits: int, stride: int, row: tuple[int, ...], options: tuple[int, ...], states: int,
        candidates: int, out: tuple[int, int], early: bool,
    ) -> None:  # fmt: skip
        """Launch; arguments as in `prepare_peaks`, and the address of the candidates in the scratch."""
        sizes = (stride, vocabulary, words, aligned)
        run(grid, block, 0, stream, (logits, *row, *options, states, candidates, *out, *sizes), early)

    return launch


def prepare_logprobs(function: Function, *, rows: int, vocabulary: int, words: int, aligned: bool, most: int) -> Launch:
    """Return what launches `logprobs_source`; arguments as in `prepare_peaks`, and the tokens asked for at most."""
    grid, block, run = (rows, 1, 1), (_LOGPROBS_THREADS, 1, 1), function.launch

    def launch(
        *, stream: int, logits: int, stride: int, row: tuple[int, ...], targets: int, asks: int,
        out: tuple[int, int, int, int], early: bool,
    ) -> None:  # fmt: skip
        """Launch; arguments as in `prepare_peaks`, and those of `ops.logprobs`; `out`: where the results go."""
        sizes = (stride, vocabulary, words, aligned, most)
        run(grid, block, 0, stream, (logits, *row, targets, asks, *out, *sizes), early)

    return launch
