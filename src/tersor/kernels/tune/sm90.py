"""The sm90 schedule: wgmma, any number of tokens, one or two persistent CTAs on a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass

from tersor.hardware import Chip
from tersor.kernels.tune.problem import SM90, LinearConfig, LinearProblem

COLUMNS = 128
FEW_TOKENS = 16
"""Up to so many tokens mma.sync multiplies."""
_MAX_SLOTS = 16
_RESERVED_SHARED = 1024
"""Shared memory the driver keeps for each resident CTA, in bytes (CUDA C++ Programming Guide, compute 8.0 on)."""
_STATIC_SHARED = 1024
"""Barriers, up to the alignment of the rings."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A compiled shape of the kernel (sm90_linear.cuh)."""

    tokens: int
    row_groups: int
    channel_groups: int
    cluster: int
    resident: int

    @property
    def rows(self) -> int:
        """Output rows."""
        return 64 * self.row_groups

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * (self.row_groups * self.channel_groups + 1)

    def weight_slot_bytes(self, bits: int, scale_bytes: int) -> int:
        """Return the bytes of a slot of packed weights and their scales."""
        return self.row_groups * (1024 * bits + 64 * scale_bytes)

    @property
    def x_slots_of_block(self) -> int:
        """Slots that the activations of one block of 128 channels take."""
        return 1 if self.tokens < 128 else 2

    @property
    def x_slot_bytes(self) -> int:
        """The bytes of a slot of 16-bit activations."""
        return self.tokens * 256 // self.x_slots_of_block

    @property
    def exchange_bytes(self) -> int:
        """The bytes in which channel groups hand their sums over, or many tokens' results are turned."""
        if self.tokens >= 128:
            return 8192 * self.row_groups
        return 128 * self.row_groups * (self.channel_groups - 1) * self.tokens * 2

    def slots(self, bits: int, scale_bytes: int, chip: Chip) -> tuple[int, int]:
        """Return (slots of weights, slots of activations): equally deep, then what is left for activations.

        Both are multiples of what the channel groups take at a time.
        """
        budget = (chip.shared_bytes + _RESERVED_SHARED) // self.resident - _RESERVED_SHARED - _STATIC_SHARED
        budget -= self.exchange_bytes
        weight, x = self.weight_slot_bytes(bits, scale_bytes), self.x_slot_bytes
        groups, x_groups = self.channel_groups, self.channel_groups * self.x_slots_of_block
        depth = min(_MAX_SLOTS, max(3, budget // (weight + self.x_slots_of_block * x))) // groups * groups
        return depth, min(_MAX_SLOTS, (budget - depth * weight) // x) // x_groups * x_groups

    def shared_bytes(self, bits: int, scale_bytes: int, chip: Chip) -> int:
        """Return the dynamic shared memory of a CTA."""
        weights, xs = self.slots(bits, scale_bytes, chip)
        return weights * self.weight_slot_bytes(bits, scale_bytes) + xs * self.x_slot_bytes + self.exchange_bytes


def config(problem: LinearProblem, tile: Tile, whole_tiles: int, splits: int, ctas: int, chip: Chip) -> LinearConfig:
    """Return the configuration of one tile shape with its last tiles, those from `whole_tiles` on, split."""
    weight_slots, x_slots = tile.slots(problem.bits, problem.scale_bytes, chip)
    return LinearConfig(
        schedule=SM90,
        n_tile=tile.tokens,
        row_groups=tile.row_groups,
        channel_groups=tile.channel_groups,
        cluster=tile.cluster,
        resident=tile.resident,
        weight_slots=weight_slots,
        x_slots=x_slots,
        token_tiles=-(-problem.n // tile.tokens),
        row_tiles=-(-problem.oc // (tile.rows * tile.cluster)) * tile.cluster,
        whole_tiles=whole_tiles,
        splits=splits,
        ctas=ctas,
        shared_bytes=tile.shared_bytes(problem.bits, problem.scale_bytes, chip),
    )


def tile_of(config: LinearConfig) -> Tile:
    """Return the tile shape of a configuration."""
    return Tile(config.n_tile, config.row_groups, config.channel_groups, config.cluster, config.resident)


def box_rows(config: LinearConfig, n: int) -> int:
    """Return how many tokens one copy of activations brings: a CTA's share of the tile, no more than there are."""
    halves = 2 // tile_of(config).x_slots_of_block
    return min(n, config.n_tile // max(1, config.cluster // halves))


def tiles(scale_groups: int) -> tuple[Tile, ...]:
    """Return the tile shapes for one scale a row (0) or scales in groups."""
    return tuple(tile for tile in TILES if scale_groups == 0 or tile.tokens <= GROUPED_TOKENS)


TILES = tuple(Tile(t, 2, 1, 1, 2) for t in (8, 16, 32, 64)) + (Tile(128, 2, 1, 1, 1), Tile(256, 2, 1, 1, 1))
GROUPED_TOKENS = 64


def choose(problem: LinearProblem, chip: Chip) -> LinearConfig:
    tile = next(
        (tile for tile in tiles(problem.scale_groups) if problem.n <= tile.tokens), tiles(problem.scale_groups)[-1]
    )
    t = -(-problem.oc // tile.rows) * -(-problem.n // tile.tokens)
    blocks = -(-problem.ic // COLUMNS)
    splits = max(1, min(blocks, chip.sms * tile.resident // t))
    return config(problem, tile, 0, splits, min(t * splits, chip.sms * tile.resident), chip)
