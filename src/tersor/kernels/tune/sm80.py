"""The sm80 schedule: mma.sync, up to 64 tokens, one wave of small CTAs where it can be had."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels.tune.problem import INVARIANT_TOKENS, SM80, LinearConfig, LinearProblem
from tersor.layouts.blocks import BLOCK_IC

TOKENS = 64
"""The most tokens that the schedule takes; above, weights are decoded once and cuBLAS multiplies."""
TILES = (8, 16, 32, 64)
"""Token tiles."""
ROWS = 128
"""Output rows of a CTA: 8 warps of 16."""
_MAX_SPLITS = 16
_RESERVED_SHARED = 1024
"""Shared memory the driver keeps for each resident CTA, in bytes (CUDA C++ Programming Guide, compute 8.0 on)."""
_STATIC_SHARED = 128
"""Shared memory of a CTA beside the ring, up to the ring's alignment, in bytes: the kernel has a flag there."""

# Measured on an H200 with 6-bit weights (docs/log); other chips differ in bandwidth and multiprocessors, which the
# model takes from `Chip`. Times in seconds.
_ACHIEVED = 0.88
"""Share of the datasheet's bandwidth that a stream of reads reaches."""
_RAMP = 2.0e-6
"""Start of a kernel, first fill of the rings and the drain at the end."""
_SPLIT = 0.5e-6
"""Exchange of the parts of a split sum."""
_LATENCY = (0.30e-6, 0.025e-6)
"""One block of one CTA: a constant, and a part for each token of the tile."""
_BUSY = (0.18e-6, 0.022e-6)
"""One block on a multiprocessor with enough CTAs, likewise."""


def stage_bytes(tile: int, bits: int, scale_bytes: int) -> int:
    """Return the bytes of a slot: a block with its scales for each of 8 warps, and padded rows of activations."""
    return 8 * (256 * bits + scale_bytes * 16) + tile * (BLOCK_IC + 8) * 2


def stages(tile: int, bits: int, scale_bytes: int, chip: Chip) -> tuple[int, int]:
    """Return (slots in the ring, CTAs that fit on a multiprocessor) for one token tile.

    CTAs hide each other's waits better than a deeper ring does, so the ring stays at four slots where they fit and
    shrinks to three, then two, only when not even two CTAs would.
    """
    slot = stage_bytes(tile, bits, scale_bytes)
    for depth, least in ((4, 2), (3, 2), (4, 1), (3, 1), (2, 1)):
        resident = (chip.shared_bytes + _RESERVED_SHARED) // (depth * slot + _RESERVED_SHARED)
        if resident >= least and depth * slot + _STATIC_SHARED <= chip.shared_bytes:
            return depth, min(resident, 4)
    raise ValueError(f"{chip.name} has too little shared memory for {bits}-bit weights and {tile} tokens")


def candidates(problem: LinearProblem, chip: Chip) -> Iterator[LinearConfig]:
    """Yield the configurations of the narrowest tile that holds all tokens, one for each number of splits.

    A batch-invariant problem has one number of splits whatever n; the tile does not change a token's sums.
    """
    if problem.n > TOKENS or problem.activations is not Activations.NATIVE:
        return
    tile = next(tile for tile in TILES if problem.n <= tile)
    depth, resident = stages(tile, problem.bits, problem.scale_bytes, chip)
    row_tiles = -(-problem.oc // ROWS)
    choices = range(1, min(_MAX_SPLITS, -(-problem.ic // BLOCK_IC)) + 1)
    if problem.batch_invariant:
        usual = replace(problem, n=INVARIANT_TOKENS, batch_invariant=False)
        best = min(candidates(usual, chip), key=lambda config: seconds(usual, config, chip)).splits
        choices = range(best, best + 1)
    for splits in choices:
        yield LinearConfig(
            schedule=SM80,
            n_tile=tile,
            weight_slots=depth,
            x_slots=depth,
            token_tiles=1,
            row_tiles=row_tiles,
            splits=splits,
            ctas=row_tiles * splits,
            resident=resident,
            shared_bytes=depth * stage_bytes(tile, problem.bits, problem.scale_bytes),
        )


def seconds(problem: LinearProblem, config: LinearConfig, chip: Chip) -> float:
    """Predict the time of a launch, in seconds."""
    blocks = -(-problem.ic // BLOCK_IC)
    weight_bytes = 8 * (256 * problem.bits + 16 * problem.scale_bytes)
    return launch_seconds(
        tile=config.n_tile,
        ctas=config.ctas,
        resident=config.resident,
        length=-(-blocks // config.splits),
        split=config.splits > 1,
        block_bytes=weight_bytes + problem.n * BLOCK_IC * 2,
        chip=chip,
    )


def launch_seconds(
    *, tile: int, ctas: int, resident: int, length: int, split: bool, block_bytes: float, chip: Chip
) -> float:
    """Predict the time of CTAs that do the same, in seconds.

    The longest of three: the busiest multiprocessor's bytes at its share of the bandwidth, its blocks at the rate of
    a full multiprocessor, and the blocks of one CTA after the other at their latency. Each wave adds a ramp, and the
    last of several a tail.

    Args:
        tile: tokens in a tile.
        ctas: how many there are.
        resident: of these, so many fit on a multiprocessor.
        length: blocks of input channels that each walks through.
        split: whether they exchange split sums.
        block_bytes: of weights, scales and activations of a block, as if all came from memory.
        chip: the GPU.
    """
    rate = chip.bandwidth * _ACHIEVED / chip.sms
    latency, busy = (constant + slope * tile for constant, slope in (_LATENCY, _BUSY))
    blocks_of_sm = -(-ctas // chip.sms) * length
    waves = -(-ctas // (chip.sms * resident))
    work = max(blocks_of_sm * block_bytes / rate, blocks_of_sm * busy, waves * length * latency)
    tail = length * latency if waves > 1 else 0.0  # CTAs of the last wave end at different times
    return work + tail + waves * _RAMP + (_SPLIT if split else 0.0)
