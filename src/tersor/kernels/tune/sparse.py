"""Which tile multiplies a pruned weight, how its sums are split, and when it is decoded for cuBLAS instead.

Times are predicted from what is counted, bytes, instructions and accesses of shared memory, by a few constants that a
measurement refits (`SparseCosts`). How blocks are dealt out to places is a property of the weight in memory, whose
queues begin anew where a place begins (`layouts.sparse_cuts`): `places` chooses how many for the chip and the shape
alone. So does `choose` choose a tile, and whether it is cut, whatever the density: every tile reads the same bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tersor.hardware import Chip
from tersor.kernels.tune import sm90
from tersor.kernels.tune.beside import SCRATCH_BYTES
from tersor.kernels.tune.sparse_tile import (
    FEW,
    TOKENS,
    SparseConfig,
    SparseTile,
    config,
    decompress_tile,
    tile_for,
    tiles,
)
from tersor.layouts.blocks import BLOCK_IC, UNIT_OC, ic_blocks
from tersor.layouts.sparse_cuts import CUT_UNITS

__all__ = [
    "COSTS",
    "FEW",
    "TOKENS",
    "SparseConfig",
    "SparseCosts",
    "SparseProblem",
    "SparseTile",
    "asked",
    "candidates",
    "choose",
    "compute_seconds",
    "config",
    "cublas_seconds",
    "decompress_seconds",
    "decompress_tile",
    "fused",
    "least_bytes",
    "places",
    "seconds",
    "slice_rows",
    "smaller",
    "stored_bits",
    "tile_for",
    "tiles",
]

_LEAST_BLOCKS = (1, 2, 4, 8)
"""Blocks that a place has at least: how many places there may be, but for a multiprocessor each."""
_COUNTED = 1024
"""Weights of which instructions and clocks are counted: a warp's of half a block."""
_TOKEN_STEP = 32
_UNIT_COUNTS = UNIT_OC * BLOCK_IC // _COUNTED
_USUAL_DENSITY, _USUAL_TOKENS, _USUAL_INSTRUCTIONS, _WIDE_INSTRUCTIONS = 0.5, 16, 104, 137
"""What places are chosen for; the last of values of 16 bits."""
_TILE_ROWS = CUT_UNITS * UNIT_OC
"""Rows that are cut in the same blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCosts:
    """What the times of kernels of pruned weights are predicted from; counts are of 1,024 weights.

    Attributes:
        start: seconds of a launch before and behind its loads.
        item: seconds of each item in turn that a CTA takes, before and behind its loads.
        memory: part of the datasheet's bandwidth that all multiprocessors reach together.
        share: what one can take of that, in even shares.
        issue: instructions that a multiprocessor starts in a clock.
        latency: clocks that a warp takes which has a scheduler for itself.
        together: warpgroups of a CTA wait for the last of them, that many take this power of their number longer.
        shared: clocks of shared memory, of values of 8 and of 16 bits; each token adds a quarter.
        tensor: part of the tensor cores' peak that wgmma reaches.
        l2: bytes of activations in a clock of a multiprocessor.
        run: part of the bytes of a tile that it has more with every cut.
        cut: seconds that parts of a cut tile take to become one.
        exchange: seconds that a byte of their sums takes.
        cublas: part of the tensor cores' peak that cuBLAS reaches.
        decompress: part of the bandwidth that the kernel reaches which decodes for it.
    """

    start: float = 6.0e-6
    item: float = 4.1e-6
    memory: float = 0.9
    share: float = 1.3
    issue: float = 2.61
    latency: float = 417.0
    together: float = 0.176
    shared: tuple[float, float] = (27.8, 52.5)
    tensor: float = 0.76
    l2: float = 40.0
    run: float = 0.01
    cut: float = 3.7e-6
    exchange: float = 5.9e-13
    cublas: float = 0.72
    decompress: float = 0.8


COSTS = SparseCosts()
"""Of an H200: `item`, `issue`, `latency`, `together`, `shared`, `cut` and `exchange` are fitted to 36 times of 8 to 64
tokens (bench/results/sparse_even_h200.json: mean error 4 %), the others counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseProblem:
    """One product y[N, OC] = x[N, IC] @ W^T with a pruned W in kernel tiles.

    Attributes:
        oc, ic, n: sizes; n is at least 1.
        bits: of a value in queues, 8 or 16.
        instructions: of a warp for 1,024 weights (`SparsePacking.instructions`).
        places: of the layout.
        nbytes: of the weight in memory.
        bytewise: whether activations are bytes.
        batch_invariant: whether a row of y must not depend on how many other rows there are.
    """

    oc: int
    ic: int
    n: int
    bits: int
    instructions: int
    places: int
    nbytes: int
    bytewise: bool = False
    batch_invariant: bool = False


def candidates(problem: SparseProblem, chip: Chip) -> Iterator[SparseConfig]:
    """Yield how the kernel may run a problem: up to 64 tokens with a tile of all of them.

    Batch-invariant it is one tile for every number of tokens.
    """
    if problem.batch_invariant:
        widths: tuple[int, ...] = (FEW,)
    elif problem.n <= FEW:
        widths = (next(tokens for tokens in TOKENS if problem.n <= tokens),)
    else:
        widths = tuple(tokens for tokens in TOKENS if tokens >= FEW)
    for tokens in widths:
        for tile in tiles(tokens, problem.bits, chip, problem.bytewise):
            for places in sorted({problem.places, 0}, reverse=True):
                yield config(tile, problem.oc, places, chip, problem.n)


def choose(problem: SparseProblem, chip: Chip) -> SparseConfig:
    """Return the configuration that is predicted to compute soonest; of batch-invariant ones the first."""
    if problem.batch_invariant:
        return next(candidates(problem, chip))
    return min(candidates(problem, chip), key=lambda found: compute_seconds(problem, found, chip))


def fused(problem: SparseProblem, chip: Chip) -> bool:
    """Tell whether a product is predicted to take no longer in the kernel than decoded for cuBLAS.

    Bytes are multiplied in the kernel alone.
    """
    if problem.batch_invariant or problem.bytewise or problem.n <= FEW:
        return True
    return seconds(problem, choose(problem, chip), chip) <= decompress_seconds(problem, chip)


def seconds(problem: SparseProblem, config: SparseConfig, chip: Chip, costs: SparseCosts = COSTS) -> float:
    """Return the predicted time of a launch."""
    busiest = _busiest(problem, config, chip) / _units(problem, config)
    share = max(1.0, busiest * chip.sms / costs.share)
    moved = problem.nbytes * share + 2 * problem.n * (problem.oc + problem.ic)
    return max(moved / (chip.bandwidth * costs.memory) + costs.start, compute_seconds(problem, config, chip, costs))


def compute_seconds(problem: SparseProblem, config: SparseConfig, chip: Chip, costs: SparseCosts = COSTS) -> float:
    """Return the time that a launch takes where memory is no bound: by instructions, units and exchanges."""
    tile = config.tile
    active = min(tile.resident, -(-config.ctas // chip.sms))
    counted = tile.row_groups * _UNIT_COUNTS
    together = tile.row_groups**costs.together
    clocks = max(
        (problem.instructions + tile.tokens / 8) / costs.issue * together,
        costs.latency / (4 * tile.row_groups * active) * together,
        costs.shared[problem.bits == 16] + tile.tokens / 4,
        2 * _COUNTED * tile.tokens / sm90.FLOPS_OF_CLOCK / costs.tensor / (1 + problem.bytewise),
        2 * BLOCK_IC * tile.tokens / counted / costs.l2 / (1 + problem.bytewise),
    )
    total = costs.start + _busiest(problem, config, chip) * _UNIT_COUNTS * clocks / sm90.clock(chip)
    token_tiles = tile.token_tiles(problem.n)
    if not config.places:
        return total + costs.item * math.ceil(-(-problem.oc // tile.rows) * token_tiles / config.ctas)
    turns = tile.neighbours * token_tiles / config.place_ctas
    exchanged = config.places * tile.neighbours * token_tiles * tile.part_bytes
    return total + costs.item * max(1.0, turns) + costs.cut * turns + exchanged * costs.exchange


def cublas_seconds(oc: int, ic: int, n: int, chip: Chip, costs: SparseCosts = COSTS) -> float:
    """Return the predicted time of cuBLAS with a dense weight of 16 bits."""
    return costs.start + max(
        2 * oc * ic / (chip.bandwidth * costs.memory), 2 * oc * ic * n / (chip.fp16_ops * costs.cublas)
    )


def decompress_seconds(problem: SparseProblem, chip: Chip, costs: SparseCosts = COSTS) -> float:
    """Return the predicted time of a product that decodes a slice at a time for cuBLAS."""
    oc, ic = problem.oc, problem.ic
    slices = -(-oc // slice_rows(oc, ic, problem.places, chip))
    moved = problem.nbytes + 2 * oc * ic
    decoding = slices * 2 * costs.start + moved / (chip.bandwidth * costs.decompress)
    return decoding + cublas_seconds(oc, ic, problem.n, chip, costs)


def slice_rows(oc: int, ic: int, places: int, chip: Chip) -> int:
    """Return the rows that are decoded at a time: whole tiles, of which every multiprocessor has a CTA's, or all.

    Slices are about even, of `SCRATCH_BYTES` where that is enough for all multiprocessors. With a quarter of it, seven
    slices of 28672x7168 took 337 us for 128 tokens.
    """
    tiles = -(-oc // _TILE_ROWS)
    ctas = CUT_UNITS * (places or tiles)  # of all rows
    least, slices = -(-tiles * chip.sms // ctas), -(-2 * oc * ic // SCRATCH_BYTES)
    return _TILE_ROWS * min(tiles, max(least, -(-tiles // slices)))


@functools.cache
def places(oc: int, ic: int, bits: int, chip: Chip) -> int:
    """Return to how many places the blocks of a weight [oc, ic] with values of so many bits are dealt out on a chip.

    One a multiprocessor, or fewer where that is predicted to take less for few tokens, or none: CTAs are to be even,
    and each place costs the exchange of a tile's sums and its queues' unequal ends.
    """
    blocks = -(-oc // _TILE_ROWS) * ic_blocks(ic)
    best, least = 0, math.inf
    for count in (0, *sorted({min(chip.sms, blocks // own) for own in _LEAST_BLOCKS} - {0})):
        usual = oc * ic * stored_bits(_USUAL_DENSITY, bits, oc, count) / 8
        problem = SparseProblem(
            oc=oc,
            ic=ic,
            n=_USUAL_TOKENS,
            bits=bits,
            instructions=_USUAL_INSTRUCTIONS,
            places=count,
            nbytes=round(usual),
        )
        time = seconds(problem, choose(problem, chip), chip)
        if time < least:
            best, least = count, time
    return best


def least_bytes(bits: int, chip: Chip, costs: SparseCosts = COSTS) -> int:
    """Return the bytes that memory brings a multiprocessor as it expands a unit's block of values of so many bits."""
    instructions = _USUAL_INSTRUCTIONS if bits == 8 else _WIDE_INSTRUCTIONS
    expanding = _UNIT_COUNTS * instructions / costs.issue / sm90.clock(chip)
    return round(expanding * chip.bandwidth * costs.memory * costs.share / chip.sms)


def stored_bits(density: float, bits: int, oc: int, places: int) -> float:
    """Return about the bits in memory of a weight of which such a part is left, of values of so many bits."""
    return 1 + density * bits * (1.03 + COSTS.run * places / -(-oc // _TILE_ROWS))


def asked(problem: SparseProblem, chip: Chip) -> set[SparseTile]:
    """Return the tiles that `choose` takes for any number of tokens up to `problem.n`, whatever `fused` says."""
    return {choose(one, chip).tile for one in smaller(problem)}


def smaller(problem: SparseProblem) -> Iterator[SparseProblem]:
    """Yield the same problem with other numbers of tokens: those at which a choice may change, of many tokens some."""
    few = min(problem.n, FEW)
    counts = {few, *(tokens for tokens in TOKENS if tokens < few), *range(FEW + 1, problem.n + 1, _TOKEN_STEP)}
    for n in sorted(counts | {problem.n}):
        yield replace(problem, n=n)


def _units(problem: SparseProblem, config: SparseConfig) -> int:
    """Return the blocks of 64 rows by 128 channels that all token tiles have, and the rows of tiles behind the last."""
    rows = -(-problem.oc // config.tile.rows) * config.tile.row_groups
    return rows * ic_blocks(problem.ic) * config.tile.token_tiles(problem.n)


def _busiest(problem: SparseProblem, config: SparseConfig, chip: Chip) -> int:
    """Return how many of these the multiprocessor has that has most."""
    tile = config.tile
    if config.places:
        blocks = -(-(-(-problem.oc // _TILE_ROWS) * ic_blocks(problem.ic)) // config.places)
        return -(-config.places // chip.sms) * blocks * CUT_UNITS * tile.token_tiles(problem.n)
    items = -(-problem.oc // tile.rows) * tile.token_tiles(problem.n)
    rounds = -(-items // config.ctas)
    return rounds * -(-config.ctas // chip.sms) * ic_blocks(problem.ic) * tile.row_groups
