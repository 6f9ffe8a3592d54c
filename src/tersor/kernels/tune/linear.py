"""The choice for one linear: which schedule, how wide a token tile, how deep the ring, how the channels are split."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tersor.hardware import Chip

SM80 = "sm80"
SM90 = "sm90"
SM80_TOKENS = 64
"""The most tokens that the sm80 schedule takes; above, weights are decoded once and cuBLAS multiplies."""
SM80_TILES = (8, 16, 32, 64)
"""Token tiles of the sm80 schedule."""
SM90_RESIDENT = {8: (1, 2), 16: (1, 2), 32: (1, 2), 64: (1, 2), 128: (1,), 256: (1,)}
"""Token tile of the sm90 schedule -> CTAs that may share a multiprocessor: one with a deep ring, or two."""
_GROUPED_TILE = 64
"""The widest tile with scales in groups: two sets of sums must fit in registers."""

ROWS = 128
"""Output rows of a CTA: 8 warps of 16, or two warpgroups of 64."""
COLUMNS = 128
_MAX_SPLITS = 16
_RESERVED_SHARED = 1024
"""Shared memory the driver keeps for each resident CTA, in bytes (CUDA C++ Programming Guide, compute 8.0 on)."""
_STATIC_SHARED = 1024
"""Barriers of the sm90 schedule, up to the alignment of its ring."""

# Measured on an H200 with 6-bit weights (docs/log.md); other chips differ in bandwidth and multiprocessors, which the
# model takes from `Chip`. Times in seconds.
_ACHIEVED = 0.88
"""Share of the datasheet's bandwidth that a stream of reads reaches."""
_RAMP = 2.0e-6
"""Start of a kernel, first fill of the rings and the drain at the end."""
_SM80_SPLIT = 0.5e-6
"""Exchange of the parts of a split sum."""
_SM80_LATENCY = (0.30e-6, 0.025e-6)
"""One block of one CTA: a constant, and a part for each token of the tile."""
_SM80_BUSY = (0.18e-6, 0.022e-6)
"""One block on a multiprocessor with enough CTAs, likewise."""
_SM90_BUSY = {8: 0.28e-6, 16: 0.30e-6, 32: 0.34e-6, 64: 0.42e-6, 128: 0.72e-6, 256: 1.35e-6}
"""One block of a CTA on a busy multiprocessor, by token tile."""
_SM90_SPLIT = 0.5e-6
"""Exchange of the parts of a split sum, beside writing and reading them."""
_FEW_TOKENS = 4
_FEW_WEIGHTS = 1 << 26
"""Up to so many tokens and weights the sm80 schedule starts and ends sooner than its successor streams faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProblem:
    """One product y[N, OC] = x[N, IC] @ W^T with packed W.

    Attributes:
        oc, ic, n: sizes; n is at least 1.
        bits: width of a code.
        scale_groups: scales of one row in a block of 128 channels; 0 for one scale a row.
        scale_bytes: what they take in memory, zero points included.
        aligned: rows of x start on 16 bytes, which a tensor map needs.
    """

    oc: int
    ic: int
    n: int
    bits: int
    scale_groups: int = 0
    scale_bytes: int = 0
    aligned: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearConfig:
    """How a fused kernel runs a problem.

    Attributes:
        schedule: `sm80` or `sm90`.
        n_tile: tokens in a tile.
        stages: slots in the shared-memory ring.
        token_tiles, row_tiles, splits: CTAs along tokens, output channels and input channels.
        resident: CTAs meant to share a multiprocessor.
        shared_bytes: dynamic shared memory of a CTA.
    """

    schedule: str
    n_tile: int
    stages: int
    token_tiles: int
    row_tiles: int
    splits: int
    resident: int
    shared_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.schedule} schedule, {self.n_tile} tokens, {self.stages} stages, "
            f"grid {self.token_tiles} x {self.row_tiles} x {self.splits}, {self.shared_bytes / 1024:.0f} KiB shared"
        )


def sm80_stage_bytes(tile: int, bits: int, scale_bytes: int) -> int:
    """Return the bytes of a slot: a block with its scales for each of 8 warps, and padded rows of activations."""
    return 8 * (256 * bits + scale_bytes * 16) + tile * (COLUMNS + 8) * 2


def sm90_stage_bytes(tile: int, bits: int, scale_bytes: int) -> int:
    """Return the bytes of a slot: activations, then a unit with its scales for each warpgroup, in whole KiB."""
    return -(-(tile * COLUMNS * 2 + 2048 * bits + 128 * scale_bytes) // 1024) * 1024


def sm80_stages(tile: int, bits: int, scale_bytes: int, chip: Chip) -> tuple[int, int]:
    """Return (slots in the ring, CTAs that fit on a multiprocessor) for one token tile.

    CTAs hide each other's waits better than a deeper ring does, so the ring stays at four slots where they fit and
    shrinks to three, then two, only when not even two CTAs would.
    """
    slot = sm80_stage_bytes(tile, bits, scale_bytes)
    for depth, least in ((4, 2), (3, 2), (4, 1), (3, 1), (2, 1)):
        resident = (chip.shared_bytes + _RESERVED_SHARED) // (depth * slot + _RESERVED_SHARED)
        if resident >= least:
            return depth, min(resident, 4)
    raise ValueError(f"{chip.name} has too little shared memory for {bits}-bit weights and {tile} tokens")


def sm90_stages(tile: int, resident: int, bits: int, scale_bytes: int, chip: Chip) -> int:
    """Return the slots in the ring for one token tile: what fits beside the other CTA, at most eight."""
    budget = (chip.shared_bytes + _RESERVED_SHARED) // resident - _RESERVED_SHARED - _STATIC_SHARED
    return max(2, min(8, budget // sm90_stage_bytes(tile, bits, scale_bytes)))


def sm90_tiles(scale_groups: int) -> tuple[int, ...]:
    """Return the token tiles that the sm90 schedule has for one scale a row (0) or scales in groups."""
    return tuple(tile for tile in SM90_RESIDENT if scale_groups == 0 or tile <= _GROUPED_TILE)


def sm90_resident(tile: int, scale_groups: int) -> tuple[int, ...]:
    """Return how many CTAs may share a multiprocessor; with scales in groups the widest needs all registers."""
    return (1,) if scale_groups and tile == _GROUPED_TILE else SM90_RESIDENT[tile]


def fused(problem: LinearProblem, chip: Chip) -> bool:
    """Tell whether a fused kernel takes the problem; otherwise weights are decoded for cuBLAS."""
    return problem.n <= SM80_TOKENS or (chip.capability == (9, 0) and problem.aligned)


@functools.lru_cache(maxsize=4096)
def choose(problem: LinearProblem, chip: Chip) -> LinearConfig:
    """Choose the fused kernel's configuration by predicted time; `fused` must say yes."""
    few = problem.n <= _FEW_TOKENS and problem.oc * problem.ic <= _FEW_WEIGHTS
    if chip.capability == (9, 0) and problem.aligned and not few:
        return _choose_sm90(problem, chip)
    return _choose_sm80(problem, chip)


def _choose_sm80(problem: LinearProblem, chip: Chip) -> LinearConfig:
    """The longest of three, for each number of splits: the busiest multiprocessor's bytes at its share of the
    bandwidth, its blocks at the rate of a full multiprocessor, and the blocks of one CTA after the other at their
    latency. Each wave adds a ramp, and the last of several a tail."""
    tile = next(tile for tile in SM80_TILES if problem.n <= tile)
    depth, resident = sm80_stages(tile, problem.bits, problem.scale_bytes, chip)
    row_tiles = -(-problem.oc // ROWS)
    blocks = -(-problem.ic // COLUMNS)
    block_bytes = 8 * (256 * problem.bits + 16 * problem.scale_bytes) + problem.n * COLUMNS * 2
    rate = chip.bandwidth * _ACHIEVED / chip.sms
    latency, busy = (constant + slope * tile for constant, slope in (_SM80_LATENCY, _SM80_BUSY))

    def seconds(splits: int) -> float:
        ctas = row_tiles * splits
        length = -(-blocks // splits)
        blocks_of_sm = -(-ctas // chip.sms) * length
        waves = -(-ctas // (chip.sms * resident))
        work = max(blocks_of_sm * block_bytes / rate, blocks_of_sm * busy, waves * length * latency)
        tail = length * latency if waves > 1 else 0.0  # CTAs of the last wave end at different times
        return work + tail + waves * _RAMP + (_SM80_SPLIT if splits > 1 else 0.0)

    splits = min(range(1, min(_MAX_SPLITS, blocks) + 1), key=seconds)
    return LinearConfig(
        schedule=SM80,
        n_tile=tile,
        stages=depth,
        token_tiles=1,
        row_tiles=row_tiles,
        splits=splits,
        resident=resident,
        shared_bytes=depth * sm80_stage_bytes(tile, problem.bits, problem.scale_bytes),
    )


def _choose_sm90(problem: LinearProblem, chip: Chip) -> LinearConfig:
    """The longer of two, for each tile, residency and number of splits: the busiest multiprocessor's bytes
    (activations, which come from L2, count a quarter) and its blocks at the rate of a busy one. A further wave adds a
    ramp, which a second resident CTA hides for the most part."""
    blocks = -(-problem.ic // COLUMNS)
    row_tiles = -(-problem.oc // ROWS)
    rate = chip.bandwidth * _ACHIEVED / chip.sms
    tiles = sm90_tiles(problem.scale_groups)
    holding = [tile for tile in tiles if problem.n <= tile <= _GROUPED_TILE]
    candidates = holding[:1] or [tile for tile in tiles if tile >= _GROUPED_TILE]

    def seconds(choice: tuple[int, int, int]) -> float:
        tile, resident, splits = choice
        ctas = -(-problem.n // tile) * row_tiles * splits
        block_bytes = 2048 * problem.bits + 128 * problem.scale_bytes + tile * COLUMNS / 2
        blocks_of_sm = -(-ctas // chip.sms) * -(-blocks // splits)
        work = blocks_of_sm * max(block_bytes / rate, _SM90_BUSY[tile])
        waves = -(-ctas // (chip.sms * resident))
        exchange = _SM90_SPLIT + 8 * ctas * ROWS * tile / chip.bandwidth if splits > 1 else 0.0
        return work + _RAMP + _RAMP / resident**2 * (waves - 1) + exchange

    choices = [
        (tile, resident, splits)
        for tile in candidates
        for resident in sm90_resident(tile, problem.scale_groups)
        for splits in range(1, min(_MAX_SPLITS, blocks) + 1)
    ]
    tile, resident, splits = min(choices, key=seconds)
    depth = sm90_stages(tile, resident, problem.bits, problem.scale_bytes, chip)
    return LinearConfig(
        schedule=SM90,
        n_tile=tile,
        stages=depth,
        token_tiles=-(-problem.n // tile),
        row_tiles=row_tiles,
        splits=splits,
        resident=resident,
        shared_bytes=depth * sm90_stage_bytes(tile, problem.bits, problem.scale_bytes),
    )
