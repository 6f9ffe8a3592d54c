"""How long does the sm90 schedule take for the experts of a layer? What tiles cost in the dense kernel, and more.

What a launch does follows from the problem (`Load`), how long that takes from a few constants (`Constants`), which
`bench/experts_costs.py` fits to times that `bench/sweep_experts.py` takes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from tersor.hardware import Chip
from tersor.kernels.tune import cost
from tersor.kernels.tune.experts_problem import ExpertsProblem, expected_blocks
from tersor.kernels.tune.tile import Tile
from tersor.layouts.blocks import BLOCK_IC

GATHERED_TOKENS = 16
"""Up to so many tokens in a tile the kernel fetches those of each expert by itself; for more they are put in order
first."""
EXCHANGE_BLOCKS, PART_BLOCKS = 3.0, 0.5
"""What an exchange of split sums and each part of it take where the device settles the splits (experts/sm90_work.cuh),
in the time of a block."""
_MOST_SPLITS = 4
_WIDE = 64
"""Tiles of more tokens are split in two at the most, since their sums are many."""
_WEIGHTS_FROM_L2, _X_FROM_L2 = 0.5, 0.25
"""What a byte from L2 costs of one from memory, as in `sm90.seconds`."""
_SHARPNESS = 6.0
"""Of several times that overlap, the longest is taken as their norm of this order: nearly equal ones hinder each
other."""
_DEVIATIONS = (-1.28, -0.52, 0.0, 0.52, 1.28)
"""Standard deviations from the mean at the middle of each fifth of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What experts cost beside the arithmetic and the exchanges of the dense kernel's tiles.

    Attributes:
        start: microseconds of a launch.
        tables: more of the first product, which waits for the kernel that routes.
        bandwidth: of the datasheet's, what the busiest multiprocessor gets as its even share. More than 1, since a part
            of the experts is found in L2.
        l2: 10^3 bytes that a multiprocessor gets in a microsecond through L2, from memory or not.
        row: microseconds for each token of a tile that the kernel fetches by itself, each block of channels.
        item: microseconds between one item of a CTA and the next.
        kilobyte: more for each 1024 bytes of an item's sums, which are rounded and stored.
        gated: more of the first product for each of them, whose rows are gated in pairs.
        aligned: by how much slower the first product is where every CTA has the same row tile of all its experts. Why
            is not known.
    """

    start: float
    tables: float
    bandwidth: float
    l2: float
    row: float
    item: float
    kilobyte: float
    gated: float
    aligned: float


CONSTANTS = Constants(
    start=1.08,
    tables=1.93,
    bandwidth=1.18,
    l2=55.4,
    row=0.0254,
    item=1.06,
    kilobyte=0.0165,
    gated=0.0245,
    aligned=0.0674,
)
"""Fitted to 781 launches on an H200, of experts of four models in FP6 and float16."""


class Load(NamedTuple):
    """What a launch does whose tokens go to experts at random; a number each, or an array with one of each launch.

    Attributes:
        shared, alone: blocks of channels of the busiest CTA, while others share its multiprocessor and while none does.
        waves: items of that CTA.
        resident: CTAs that share a multiprocessor.
        shared_block, alone_block: microseconds of the arithmetic of a block, of all CTAs that share.
        exchange: microseconds of exchanges of split sums.
        block: microseconds of the bytes of a block at the datasheet's bandwidth, in even shares.
        rows: tokens of a block that the kernel fetches one by one.
        through_l2: 10^3 bytes that a multiprocessor takes in all.
        kilobytes: of an item's sums.
        first: 1 for the first product, 0 for the second.
        aligned: 1 where every CTA has the same row tile of all its experts.
    """

    shared: float
    alone: float
    waves: float
    resident: float
    shared_block: float
    alone_block: float
    exchange: float
    block: float
    rows: float
    through_l2: float
    kilobytes: float
    first: float
    aligned: float


def most_splits(problem: ExpertsProblem, tile: Tile) -> int:
    """Return into how many parts the input channels of a tile of the last wave may be cut."""
    blocks = -(-problem.ic // BLOCK_IC)
    return 1 if problem.batch_invariant else min(2 if tile.tokens > _WIDE else _MOST_SPLITS, blocks)


def gathers(problem: ExpertsProblem, tile: Tile) -> bool:
    """Return whether the kernel of a tile fetches the tokens of each expert by itself."""
    return tile.few and not problem.batch_invariant and tile.tokens <= GATHERED_TOKENS


def splits(rest: int, slots: int, blocks: int, most: int) -> int:
    """Return into how many parts the device cuts each of the last tiles (experts/sm90_work.cuh).

    Args:
        rest: tiles beyond whole waves.
        slots: CTAs that fit at a time.
        blocks: of channels of a tile.
        most: parts that are allowed.
    """
    best, least = 1, float(blocks)
    for parts in range(2, most + 1 if rest else 2):
        time = math.ceil(parts * rest / slots - 1e-3) * -(-blocks // parts) + EXCHANGE_BLOCKS + parts * PART_BLOCKS
        if time < least:
            best, least = parts, time
    return best


@functools.lru_cache(maxsize=4096)
def load(problem: ExpertsProblem, tile: Tile, chip: Chip, first: bool, ctas: int = 0) -> Load:
    """Return what a launch of one of the two products does with a tile, the mean over random routings.

    Args:
        problem, tile, chip, first: as for `experts.seconds`.
        ctas: that have these rows, where others have those of other row sets; 0 where all do that fit.
    """
    costs = cost.of(chip.name)[tile]
    pairs = problem.tokens * problem.top_k
    expected = expected_blocks(problem.tokens, problem.top_k / problem.experts, tile.tokens)
    mean, deviation = problem.experts * expected.blocks, math.sqrt(problem.experts * expected.variance)
    row_tiles, blocks = -(-problem.oc // tile.rows), -(-problem.ic // BLOCK_IC)
    fitting, most = chip.sms * tile.resident, most_splits(problem, tile)
    slots = ctas or fitting
    shared = alone = waves = exchange = 0.0
    for deviations in _DEVIATIONS:
        count = min(max(round(mean + deviations * deviation), problem.top_k), pairs) * row_tiles
        whole, rest = divmod(count, slots)
        parts = splits(rest, slots, blocks, most)
        last, length = -(-rest * parts // slots), -(-blocks // parts)
        together = ctas > 0 or rest * parts > chip.sms
        shared += whole * blocks + (last * length if together else 0)
        alone += 0 if together else last * length
        waves += whole + last
        if parts > 1:
            megabytes = rest * parts * tile.rows * tile.tokens * 8e-6
            exchange += costs.exchange + costs.part * parts + costs.exchange_megabyte * megabytes
    fetches = first and gathers(problem, tile)
    tokens = pairs / mean if fetches else float(tile.tokens)
    weight_bytes = tile.weight_slot_bytes(problem.bits, problem.scale_bytes)
    x_bytes = tokens * BLOCK_IC * problem.activations.bits / 8
    from_memory = expected.hit / expected.blocks
    block_bytes = weight_bytes * (from_memory + _WEIGHTS_FROM_L2 * (1 - from_memory)) + _X_FROM_L2 * x_bytes
    of, units = len(_DEVIATIONS), problem.oc / tile.rows
    return Load(
        shared=shared / of,
        alone=alone / of,
        waves=waves / of,
        resident=tile.resident,
        shared_block=tile.resident * costs.block,
        alone_block=costs.block + costs.lonely,
        exchange=exchange / of,
        block=block_bytes * chip.sms / chip.bandwidth * 1e6,
        rows=tokens if fetches else 0.0,
        through_l2=mean * (units * weight_bytes + row_tiles * x_bytes) * blocks / chip.sms * 1e-3 * fitting / slots,
        kilobytes=tile.rows * tile.tokens * 4 / 1024,
        first=float(first),
        aligned=float(slots % row_tiles == 0),
    )


def microseconds(load: Load, constants: Constants) -> float:
    """Predict how long a launch takes.

    A block of channels takes a CTA as long as its arithmetic or its bytes do, whichever is longer. The launch takes as
    long as the busiest CTA, or all bytes through L2.
    """
    fetched = constants.row * load.rows
    memory = load.block / constants.bandwidth
    shared = _longest(load.shared_block + fetched, load.resident * memory)
    alone = _longest(load.alone_block + fetched, memory)
    item = constants.item + (constants.kilobyte + constants.gated * load.first) * load.kilobytes
    busiest = load.shared * shared + load.alone * alone + load.waves * item + load.exchange
    busiest *= 1 + constants.aligned * load.aligned * load.first
    return constants.start + constants.tables * load.first + _longest(busiest, load.through_l2 / constants.l2)


def _longest(one: float, other: float) -> float:
    return (one**_SHARPNESS + other**_SHARPNESS) ** (1 / _SHARPNESS)
