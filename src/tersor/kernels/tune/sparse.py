"""Which tile multiplies a pruned weight, and how its sums are split.

A tile has all tokens, 64 at most. How a tile's channels are split is a property of the weight in memory, whose queues
begin anew in every run (`layouts.sparse_tiles`): `runs` chooses that for the chip and the shape alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from tersor.hardware import Chip
from tersor.layouts.blocks import UNIT_OC, ic_blocks

MOST_TOKENS = 64
"""Tokens of the widest tile."""
TOKENS = (8, 16, 32, 64)
"""Tokens of tiles."""

_LAYER_BYTES = 512
_MIRRORED = 2
_MASK_BYTES = 1024
_STATIC_BYTES = 1024
_RESERVED = 1024
_MOST_SLOTS = 12
_LEAST_SLOTS = 4
_MOST_RUNS = 16
_ROW_GROUPS = 2


@dataclass(frozen=True, slots=True)
class SparseTile:
    """A compiled shape of the kernel (sm90_sparse.cuh).

    Attributes:
        tokens: of a tile.
        row_groups: warpgroups that multiply, each 64 output rows.
        resident: CTAs that fit on a multiprocessor.
        layers: of values in the ring of a row group, a power of two from 64 on.
        masks, x_slots: slots of masks and of activations.
        gathers: the most runs that a cluster may add.
        gather_room: parts of sums that have room of their own for that.
    """

    tokens: int
    row_groups: int
    resident: int
    layers: int
    masks: int
    x_slots: int
    gathers: int = 1
    gather_room: int = 0

    def __str__(self) -> str:
        gathers = f"g{self.gathers}" if self.gathers > 1 else ""
        return f"{self.rows}x{self.tokens}r{self.resident}l{self.layers}s{self.masks}x{self.x_slots}{gathers}"

    @property
    def rows(self) -> int:
        """Output rows."""
        return UNIT_OC * self.row_groups

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * (self.row_groups + 1)

    @property
    def part_bytes(self) -> int:
        """Bytes of a tile's sums."""
        return 4 * self.rows * self.tokens

    @property
    def slot_bytes(self) -> int:
        """Shared memory without the rings of values."""
        slots = self.x_slots * self.tokens * 256 + self.masks * self.row_groups * _MASK_BYTES
        return slots + self.gather_room * self.part_bytes

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return self.slot_bytes + self.row_groups * (self.layers + _MIRRORED) * _LAYER_BYTES


@dataclass(frozen=True, slots=True)
class SparseConfig:
    """How the kernel runs a problem.

    Attributes:
        tile: the compiled shape.
        runs: CTAs that a tile's channels are dealt out to: those of the weight's layout.
        gathered: whether these are one cluster, which adds their sums in shared memory.
        ctas: CTAs launched.
    """

    tile: SparseTile
    runs: int
    gathered: bool
    ctas: int

    def floats(self, oc: int) -> tuple[int, int]:
        """Return the float32 sums and the counters that runs exchange through memory; zero where none do."""
        if self.runs == 1 or self.gathered:
            return 0, 0
        tiles = -(-oc // self.tile.rows)
        return tiles * self.runs * self.tile.rows * self.tile.tokens, tiles


def tile_for(
    tokens: int, chip: Chip, *, row_groups: int = _ROW_GROUPS, resident: int = 1, layers: int = 128
) -> SparseTile:
    """Return a tile with as many slots as its shared memory has room for.

    Raises:
        ValueError: shared memory has not room for four slots of each kind.
    """
    room = (chip.shared_bytes + _RESERVED) // resident - _RESERVED - _STATIC_BYTES
    room -= row_groups * (layers + _MIRRORED) * _LAYER_BYTES
    slots = min(_MOST_SLOTS, room // (tokens * 256 + row_groups * _MASK_BYTES))
    if slots < _LEAST_SLOTS:
        raise ValueError(f"tiles of {64 * row_groups} rows and {tokens} tokens have no room for {layers} layers")
    return SparseTile(tokens, row_groups, resident, layers, slots, slots)


def config(tile: SparseTile, oc: int, runs: int, chip: Chip) -> SparseConfig:
    """Return how a tile runs a weight of so many output channels and runs."""
    tiles = -(-oc // tile.rows)
    gathered = 1 < runs <= tile.gathers and tiles * runs <= chip.sms * tile.resident
    items = tiles * runs
    return SparseConfig(tile, runs, gathered, items if gathered else min(items, chip.sms * tile.resident))


def choose(oc: int, n: int, runs: int, chip: Chip) -> SparseConfig:
    """Return the configuration for n tokens, at most `MOST_TOKENS`, of a weight whose layout has so many runs."""
    return config(tile_for(next(tokens for tokens in TOKENS if n <= tokens), chip), oc, runs, chip)


def runs(oc: int, ic: int, chip: Chip) -> int:
    """Return into how many runs the channels of a weight [oc, ic] are cut for a chip.

    As many as fill waves of CTAs best; each costs the exchange of a tile's sums and its queues' unequal ends, about as
    much as 3 % of a wave.
    """
    tiles = -(-oc // (UNIT_OC * _ROW_GROUPS))
    best, least = 1, float("inf")
    for count in range(1, min(_MOST_RUNS, ic_blocks(ic)) + 1):
        waves = -(-tiles * count // chip.sms)
        blocks = -(-ic_blocks(ic) // count)
        cost = waves * blocks * (1 + 0.01 * count) + (3 if count > 1 else 0)
        if cost < least:
            best, least = count, cost
    return best
