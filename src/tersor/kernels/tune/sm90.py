"""The sm90 schedule: wgmma, any number of tokens, one or two persistent CTAs on a multiprocessor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels.tune.problem import FEW_TOKENS, INVARIANT_TOKENS, SM90, LinearConfig, LinearProblem
from tersor.layouts.blocks import BLOCK_IC

_MAX_SLOTS = 16
_RESERVED_SHARED = 1024
"""Shared memory the driver keeps for each resident CTA, in bytes (CUDA C++ Programming Guide, compute 8.0 on)."""
_CLUSTER_ROOM = 0.75
"""Of the CTAs that fit on a chip, how many do in clusters of three: multiprocessors come in groups of 16 or 18."""
_CLUSTER_FILL = 0.45
"""Of the multiprocessors, how many the clusters must take: what was measured."""
_GATHER_KILOBYTE = 0.028
"""Microseconds for each 1024 bytes of the parts of a sum that a cluster gathers."""
_MAX_GATHERED = 3
_GATHER_BYTES = 128 << 10
"""What the rings of a multiprocessor hold at the least, in bytes."""
_MAX_SPLITS = 16
_MAX_LAST_SPLITS = 6
_ACHIEVED = 0.9
"""Of the datasheet's bandwidth."""
_SHARE = {1: 1.3, 2: 1.4}
"""CTAs meant to share a multiprocessor -> what one multiprocessor can take of that bandwidth, in even shares."""


class Slots(NamedTuple):
    """How a CTA's shared memory is dealt out.

    Attributes:
        weights, x: slots in the rings of weights and of activations.
        gather_room: parts of sums that a cluster gathers that have room beside the rings.
    """

    weights: int
    x: int
    gather_room: int


@dataclass(frozen=True, slots=True)
class Tile:
    """A compiled shape of the kernel (sm90_linear.cuh)."""

    tokens: int
    row_groups: int
    channel_groups: int
    cluster: int
    resident: int
    activations: Activations = Activations.NATIVE

    @property
    def e4m3(self) -> bool:
        """Whether activations are quantised to e4m3, so that the tensor cores multiply bytes."""
        return self.activations is Activations.E4M3

    @property
    def rows(self) -> int:
        """Output rows."""
        return 64 * self.row_groups

    @property
    def few(self) -> bool:
        """Whether mma.sync multiplies (`multiply_few`), unless batch invariance forbids it."""
        return (self.tokens <= FEW_TOKENS or self.channel_groups > 1) and not self.e4m3

    @property
    def turns(self) -> int:
        """Warpgroups that take the blocks of an item in turn, with few tokens."""
        return self.row_groups * self.channel_groups if self.few else 1

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * (self.row_groups * self.channel_groups + 1)

    @property
    def static_bytes(self) -> int:
        """The bytes of barriers, and of the scales of 8-bit activations, up to the alignment of the rings."""
        return 2048 if self.e4m3 and self.tokens > 128 else 1024

    @property
    def fast_sums(self) -> bool:
        """Whether 8-bit products are all added by the tensor cores, with about 14 bits (`multiply_bytes`)."""
        return self.e4m3 and self.tokens > 128

    def weight_slot_bytes(self, bits: int, scale_bytes: int) -> int:
        """Return the bytes of a slot of packed weights and their scales."""
        return self.row_groups * (1024 * bits + 64 * scale_bytes)

    @property
    def x_slots_of_block(self) -> int:
        """Slots that the activations of one block of 128 channels take."""
        return 1 if self.tokens < 128 or self.e4m3 else 2

    @property
    def x_slot_bytes(self) -> int:
        """The bytes of a slot of activations."""
        return self.tokens * (128 if self.e4m3 else 256) // self.x_slots_of_block

    @property
    def exchange_bytes(self) -> int:
        """The bytes in which warpgroups hand their sums over, or many tokens' results are turned."""
        if self.tokens >= 128:
            return 8192 * self.row_groups
        return 128 * self.row_groups * (self.turns - 1) * self.tokens * 2

    @property
    def part_bytes(self) -> int:
        """The bytes of a tile's sums."""
        return 256 * self.row_groups * self.tokens

    @property
    def gathered(self) -> int:
        """The most splits that a cluster adds in shared memory."""
        return 1 if self.cluster > 1 else min(_MAX_GATHERED, 1 + _GATHER_BYTES // self.resident // self.part_bytes)

    def slots(self, bits: int, scale_bytes: int, chip: Chip) -> Slots:
        """Return how shared memory is dealt out.

        Both rings are equally deep, then activations have what is left; they are multiples of what the warpgroups take
        at a time.
        """
        budget = (chip.shared_bytes + _RESERVED_SHARED) // self.resident - _RESERVED_SHARED - self.static_bytes
        budget -= self.exchange_bytes
        weight, x = self.weight_slot_bytes(bits, scale_bytes), self.x_slot_bytes
        depth = min(_MAX_SLOTS, max(3, budget // (weight + self.x_slots_of_block * x))) // self.turns * self.turns
        x_depth = min(_MAX_SLOTS, (budget - depth * weight) // x) // self.x_slots_of_block * self.x_slots_of_block
        if self.few:
            x_depth = depth  # multiply_few counts both rings as one
        left = budget - depth * weight - x_depth * x
        return Slots(depth, x_depth, min(self.gathered - 1, left // self.part_bytes))

    def shared_bytes(self, bits: int, scale_bytes: int, chip: Chip) -> int:
        """Return the dynamic shared memory of a CTA."""
        slots = self.slots(bits, scale_bytes, chip)
        rings = slots.weights * self.weight_slot_bytes(bits, scale_bytes) + slots.x * self.x_slot_bytes
        return rings + self.exchange_bytes + slots.gather_room * self.part_bytes


def config(
    problem: LinearProblem,
    tile: Tile,
    whole_tiles: int,
    splits: int,
    ctas: int,
    chip: Chip,
    gathered: bool = False,
) -> LinearConfig:
    """Return the configuration of one tile shape with its last tiles, those from `whole_tiles` on, split."""
    slots = tile.slots(problem.bits, problem.scale_bytes, chip)
    return LinearConfig(
        schedule=SM90,
        activations=tile.activations,
        n_tile=tile.tokens,
        row_groups=tile.row_groups,
        channel_groups=tile.channel_groups,
        cluster=tile.cluster,
        resident=tile.resident,
        weight_slots=slots.weights,
        x_slots=slots.x,
        token_tiles=-(-problem.n // tile.tokens),
        row_tiles=-(-problem.oc // (tile.rows * tile.cluster)) * tile.cluster,
        whole_tiles=whole_tiles,
        splits=splits,
        gathered=gathered,
        gather_room=slots.gather_room,
        ctas=ctas,
        shared_bytes=tile.shared_bytes(problem.bits, problem.scale_bytes, chip),
    )


def tile_of(config: LinearConfig) -> Tile:
    """Return the tile shape of a configuration."""
    sizes = (config.n_tile, config.row_groups, config.channel_groups, config.cluster, config.resident)
    return Tile(*sizes, config.activations)


def box_rows(config: LinearConfig, n: int) -> int:
    """Return how many tokens one copy of activations brings: a CTA's share of the tile, no more than there are."""
    tile = tile_of(config)
    pieces = (1 if tile.e4m3 else 2) // tile.x_slots_of_block
    return min(n, config.n_tile // max(1, config.cluster // pieces))


def tiles(scale_groups: int, activations: Activations = Activations.NATIVE) -> tuple[Tile, ...]:
    """Return the tile shapes for one scale a row (0) or scales in groups, for one way with activations."""
    fitting = (tile for tile in COSTS if scale_groups <= _MOST_SCALE_GROUPS.get(tile, scale_groups))
    return tuple(tile for tile in fitting if tile.activations is activations)


def candidates(problem: LinearProblem, chip: Chip) -> Iterator[LinearConfig]:
    """Yield the configurations worth a prediction; none where the schedule cannot run.

    Token tiles are the narrowest that hold all tokens, or any of the two widest. Where tiles do not fill one wave of
    CTAs all are split, where they fill more than one those of the last wave are.

    A batch-invariant problem has wgmma, one channel group and the same splits of all tiles, whatever n.
    """
    if chip.capability != (9, 0) or not problem.aligned:
        return
    available = tiles(problem.scale_groups, problem.activations)
    fixed = invariant_splits(problem, chip) if problem.batch_invariant else 0
    widest = max(tile.tokens for tile in available)
    holding = min((tile.tokens for tile in available if problem.n <= tile.tokens), default=widest)
    blocks = -(-problem.ic // BLOCK_IC)
    for tile in available:
        if tile.tokens != holding and min(tile.tokens, holding) < min(128, widest):
            continue
        slots = chip.sms * tile.resident // tile.cluster
        count = -(-problem.oc // (tile.rows * tile.cluster)) * -(-problem.n // tile.tokens)
        if fixed:
            if tile.channel_groups == 1 and not tile.fast_sums:
                ctas = min(count * fixed, slots) * tile.cluster
                turning = config(problem, tile, 0, fixed, ctas, chip)
                unused = tile.exchange_bytes if tile.few else 0  # wgmma hands no sums over
                yield replace(turning, few_tokens=0, shared_bytes=turning.shared_bytes - unused)
            continue
        rest = count % slots
        splittings = [
            (0, splits) for splits in range(1, min(_MAX_SPLITS, blocks) + 1) if splits == 1 or count * splits <= slots
        ]
        if count > slots and rest:
            splittings += [(count - rest, splits) for splits in range(2, min(_MAX_LAST_SPLITS, blocks) + 1)]
        for whole, splits in splittings:
            ctas = min(whole + (count - whole) * splits, slots) * tile.cluster
            room = slots if splits == 2 else slots * _CLUSTER_ROOM
            fits = whole == 0 and _CLUSTER_FILL * chip.sms <= count * splits <= room
            yield config(problem, tile, whole, splits, ctas, chip, fits and 1 < splits <= tile.gathered)


def invariant_splits(problem: LinearProblem, chip: Chip) -> int:
    """Return the splits that a batch-invariant problem has, whatever its number of tokens."""
    usual = replace(problem, n=INVARIANT_TOKENS, aligned=True, batch_invariant=False)
    options = [found for found in candidates(usual, chip) if found.channel_groups == 1 and not found.whole_tiles]
    return min(options, key=lambda found: seconds(usual, found, chip)).splits


def seconds(problem: LinearProblem, config: LinearConfig, chip: Chip) -> float:
    """Predict the time of a launch in a chain of launches, in seconds.

    CTAs run in waves, as many as fit at a time. A wave takes as long as the longest of three: the arithmetic of its
    busiest multiprocessor, the bytes of that one at the most it can take, and the bytes of all at what they share;
    activations, which come from L2, count a quarter. To that come what a launch, each further wave and the exchange of
    split sums cost.
    """
    tile = tile_of(config)
    cost = COSTS[tile]
    blocks = -(-problem.ic // BLOCK_IC)
    multiprocessors, slots = chip.sms // tile.cluster, chip.sms * tile.resident // tile.cluster
    shares = (config.token_tiles * config.row_tiles // tile.cluster - config.whole_tiles) * config.splits
    tokens = min(tile.tokens, problem.n)
    block_bytes = (
        tile.weight_slot_bytes(problem.bits, problem.scale_bytes) + tokens * BLOCK_IC * problem.activations.bits / 32
    )
    total, waves = cost.start, 0
    for items, length in ((config.whole_tiles, blocks), (shares, -(-blocks // config.splits))):
        for count, clusters in ((items // slots, slots), (1, items % slots)):
            if not count or not clusters:
                continue
            busiest = -(-clusters // multiprocessors)
            block = busiest * cost.block
            if clusters <= multiprocessors:
                block += cost.lonely
            shares_taken = max(clusters, busiest * multiprocessors / _SHARE[tile.resident])
            memory = shares_taken * tile.cluster * block_bytes / (chip.bandwidth * _ACHIEVED) * 1e6
            total += count * length * max(block, memory)
            waves += count
    total += (waves - 1) * cost.item
    if config.gathered:
        total += (config.splits - 1) * (cost.gather + _GATHER_KILOBYTE * tile.rows * tile.tokens * 4 / 1024)
    elif config.splits > 1:
        exchanged = shares * tile.cluster * tile.rows * tile.tokens * 8e-6
        total += cost.exchange + cost.part * config.splits + cost.exchange_megabyte * exchanged
    return total * 1e-6


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of one tile shape on an H200 with 6-bit weights, fitted to some 5,000 launches (bench/costs.py).

    Attributes:
        start: of a launch; with 8-bit activations their quantising, too.
        block: of the arithmetic of 128 channels of a tile.
        lonely: more of each block of a CTA that has a multiprocessor to itself and was meant to share it.
        item: of each wave of CTAs after the first.
        exchange, exchange_megabyte: of split sums, and for each 10^6 bytes written and read.
        part: of each part that the last CTA reads.
        gather: of each part that a cluster gathers, beside its bytes.
    """

    start: float
    block: float
    lonely: float
    item: float
    exchange: float
    exchange_megabyte: float
    part: float
    gather: float


COSTS = {
    Tile(8, 1, 2, 1, 2): Cost(0.319, 0.145, 0.134, 0.384, 1.2, 1.46, 0.0831, 0.349),
    Tile(8, 1, 4, 1, 1): Cost(0.563, 0.157, 0, 0.468, 0.352, 1.21, 0.198, 0.48),
    Tile(8, 2, 1, 1, 2): Cost(1.66, 0.218, 0.193, 1.88, 0.55, 0.94, 0.147, 0.459),
    Tile(8, 3, 1, 1, 1): Cost(1.06, 0.368, 0, 0.171, 0.465, 1.54, 0.103, 0.251),
    Tile(16, 1, 2, 1, 2): Cost(1.21, 0.178, 0.138, 0.147, 1.19, 0.166, 0.198, 0.613),
    Tile(16, 1, 4, 1, 1): Cost(0.6, 0.18, 0, 0.352, 0.954, 1.02, 0.181, 0.523),
    Tile(16, 2, 1, 1, 2): Cost(1.06, 0.276, 0.289, 2.36, 1.75, 0.343, 0.271, 0.842),
    Tile(16, 2, 2, 1, 1): Cost(0.4, 0.299, 0, 0.686, 2.08, 0.39, 0.192, 0.5),
    Tile(16, 3, 1, 1, 1): Cost(1.01, 0.403, 0, 0.307, 0.964, 1.09, 0.142, 0.592),
    Tile(32, 1, 1, 1, 2): Cost(1.72, 0.2, 0.134, 0.798, 1.25, 0.454, 0.239, 0.487),
    Tile(32, 1, 4, 1, 1): Cost(1.32, 0.235, 0, 1.21, 0.812, 0.653, 0.343, 0.452),
    Tile(32, 2, 1, 1, 1): Cost(0.554, 0.42, 0, 0.851, 2.06, 0.429, 0.321, 0.244),
    Tile(32, 2, 1, 1, 2): Cost(0.37, 0.34, 0.267, 0.382, 1.05, 0.444, 0.309, 0.589),
    Tile(32, 3, 1, 1, 1): Cost(1.2, 0.491, 0, 0.179, 1.03, 0.416, 0.408, 0.371),
    Tile(64, 1, 1, 1, 2): Cost(1.31, 0.21, 0.241, 0.857, 1.65, 0.122, 0.44, 0.114),
    Tile(64, 2, 1, 1, 1): Cost(1.07, 0.469, 0, 3.36, 2.12, 0.355, 0.414, 0.574),
    Tile(64, 3, 1, 1, 1): Cost(1.17, 0.646, 0, 2.5, 2.05, 0.428, 0.479, 0.543),
    Tile(128, 1, 1, 1, 2): Cost(2.62, 0.333, 0.262, 1.74, 2.1, 0.213, 0.3, 0.83),
    Tile(128, 2, 1, 1, 1): Cost(0.5, 0.76, 0, 2.47, 2.03, 0.328, 0.3, 0.83),
    Tile(128, 3, 1, 1, 1): Cost(0.5, 1.13, 0, 2.36, 1.2, 0.311, 0.3, 0.83),
    Tile(256, 2, 1, 2, 1): Cost(0.689, 1.47, 0, 2.74, 2, 0.414, 0.3, 0.83),
    Tile(16, 1, 1, 1, 2, Activations.E4M3): Cost(3.12, 0.0819, 0.159, 1.24, 1.16, 0.723, 0.154, 0.102),
    Tile(16, 2, 1, 1, 1, Activations.E4M3): Cost(1.43, 0.279, 0, 0.436, 1.54, 1.1, 0.225, 0.928),
    Tile(32, 1, 1, 1, 2, Activations.E4M3): Cost(3.83, 0.137, 0.114, 1.05, 0.457, 0.655, 0.254, 0.119),
    Tile(32, 2, 1, 1, 1, Activations.E4M3): Cost(1.61, 0.258, 0, 0.0132, 1.38, 0.833, 0.369, 0.84),
    Tile(64, 1, 1, 1, 2, Activations.E4M3): Cost(2.52, 0.14, 0.167, 0.0792, 1.93, 0.442, 0.378, 0.921),
    Tile(64, 2, 1, 1, 1, Activations.E4M3): Cost(3.17, 0.303, 0, 0.0149, 0.749, 0.613, 0.423, 0.905),
    Tile(128, 1, 1, 1, 2, Activations.E4M3): Cost(4.62, 0.229, 0.141, 0.239, 1.97, 0.417, 0.3, 0.83),
    Tile(128, 2, 1, 1, 1, Activations.E4M3): Cost(4.64, 0.456, 0, 2.65, 2.05, 0.354, 0.3, 0.83),
    Tile(256, 2, 1, 1, 1, Activations.E4M3): Cost(5.3, 0.818, 0, 5.64, 15.8, 0.0982, 0.3, 0.83),
}

_MOST_SCALE_GROUPS = {
    Tile(16, 2, 1, 1, 2): 1,
    Tile(32, 1, 4, 1, 1): 2,
    Tile(128, 3, 1, 1, 1): 0,
    Tile(256, 2, 1, 2, 1): 0,
    Tile(256, 2, 1, 1, 1, Activations.E4M3): 0,
}
"""How many scales of a row in a block the registers of a tile have room for, where not for all: those with none hold no
second set of sums."""
