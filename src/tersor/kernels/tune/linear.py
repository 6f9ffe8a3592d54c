"""The choice for one linear: how many tokens a tile takes, how deep the ring is, how the channels are split."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tersor.hardware import Chip

FUSED_TOKENS = 64
"""Up to this many tokens the fused kernel serves; above, weights are decoded once and cuBLAS multiplies."""

ROWS = 128
"""Output rows of a CTA of the fused kernel."""

_COLUMNS = 128
_BLOCKS_OF_STAGE = 8
N_TILES = (8, 16, 32, 64)
"""Tile widths of the fused kernel, in tokens."""

_STAGES = 4
_MAX_RESIDENT = 4
_MAX_SPLITS = 16
_RESERVED_SHARED = 1024
"""Shared memory the driver keeps for each resident CTA, in bytes (CUDA C++ Programming Guide, compute 8.0 on)."""

# Measured on an H200 with 6-bit weights (docs/log.md, "first fused kernel"); other chips differ in bandwidth and
# multiprocessors, which the model takes from `Chip`.
_ACHIEVED = 0.88
"""Share of the datasheet's bandwidth that a stream of reads reaches."""
_RAMP_SECONDS = 2.0e-6
"""Start of a kernel, first fill of the rings and the drain at the end."""
_SPLIT_SECONDS = 0.5e-6
"""Exchange of the parts of a split sum."""
_STAGE_SECONDS = (0.30e-6, 0.025e-6)
"""Latency of one stage of one CTA: a constant, and a part for each token of the tile."""
_BUSY_SECONDS = (0.18e-6, 0.022e-6)
"""Time a multiprocessor with enough CTAs spends on one stage, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProblem:
    """One product y[N, OC] = x[N, IC] @ W^T with packed W.

    Attributes:
        oc, ic, n: sizes.
        bits: width of a code.
        scale_groups: scales of one row in a block of 128 channels; 0 for one scale a row.
    """

    oc: int
    ic: int
    n: int
    bits: int
    scale_groups: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearConfig:
    """How the fused kernel runs a problem.

    Attributes:
        n_tile: tokens in a tile: 8, 16, 32 or 64.
        stages: slots in the shared-memory ring.
        splits: CTAs that share the channels of a row tile.
        row_tiles: CTAs along the output channels.
        shared_bytes: dynamic shared memory of a CTA.
    """

    n_tile: int
    stages: int
    splits: int
    row_tiles: int
    shared_bytes: int

    def __str__(self) -> str:
        return (
            f"n_tile {self.n_tile}, {self.stages} stages, grid {self.row_tiles} x {self.splits}, "
            f"{self.shared_bytes / 1024:.0f} KiB shared"
        )


def n_tile(n: int) -> int:
    """Return the smallest tile that holds `n` tokens (1 to 64)."""
    return next(tile for tile in N_TILES if n <= tile)


def stage_bytes(tile: int, bits: int, scale_groups: int) -> int:
    """Return the bytes of one ring slot: a block a warp with its scales, and the activations of 128 channels."""
    return _BLOCKS_OF_STAGE * (256 * bits + scale_groups * 64) + tile * (_COLUMNS + 8) * 2


def stages(tile: int, bits: int, scale_groups: int, chip: Chip) -> tuple[int, int]:
    """Return (slots in the ring, CTAs that fit on a multiprocessor) for one tile width.

    CTAs hide each other's waits better than a deeper ring does, so the ring stays at four slots where they fit and
    shrinks to three, then two, only when not even two CTAs would.
    """
    slot = stage_bytes(tile, bits, scale_groups)
    for depth, least in ((_STAGES, 2), (3, 2), (_STAGES, 1), (3, 1), (2, 1)):
        resident = (chip.shared_bytes + _RESERVED_SHARED) // (depth * slot + _RESERVED_SHARED)
        if resident >= least:
            return depth, min(resident, _MAX_RESIDENT)
    raise ValueError(f"{chip.name} has too little shared memory for {bits}-bit weights and {tile} tokens")


@functools.lru_cache(maxsize=4096)
def choose(problem: LinearProblem, chip: Chip) -> LinearConfig:
    """Choose the fused kernel's configuration by predicted time; `problem.n` is 1 to 64.

    The prediction is the longest of three: the busiest multiprocessor's bytes at its share of the bandwidth, its
    stages at the rate of a full multiprocessor, and the stages of one CTA after the other at their latency. Each wave
    adds a ramp, and the last of several a tail.
    """
    tile = n_tile(problem.n)
    depth, resident = stages(tile, problem.bits, problem.scale_groups, chip)
    row_tiles = -(-problem.oc // ROWS)
    blocks = -(-problem.ic // _COLUMNS)
    bytes_of_stage = _BLOCKS_OF_STAGE * (256 * problem.bits + 64 * problem.scale_groups) + problem.n * _COLUMNS * 2
    rate = chip.bandwidth * _ACHIEVED / chip.sms
    latency, busy = (constant + slope * tile for constant, slope in (_STAGE_SECONDS, _BUSY_SECONDS))

    def seconds(splits: int) -> float:
        ctas = row_tiles * splits
        length = -(-blocks // splits)
        stages_of_sm = -(-ctas // chip.sms) * length
        waves = -(-ctas // (chip.sms * resident))
        work = max(stages_of_sm * bytes_of_stage / rate, stages_of_sm * busy, waves * length * latency)
        tail = length * latency if waves > 1 else 0.0  # CTAs of the last wave end at different times
        return work + tail + waves * _RAMP_SECONDS + (_SPLIT_SECONDS if splits > 1 else 0.0)

    splits = min(range(1, min(_MAX_SPLITS, blocks) + 1), key=seconds)
    return LinearConfig(
        n_tile=tile,
        stages=depth,
        splits=splits,
        row_tiles=row_tiles,
        shared_bytes=depth * stage_bytes(tile, problem.bits, problem.scale_groups),
    )
