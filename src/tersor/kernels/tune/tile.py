"""A tile of the sm90 schedule: the compiled shape of its kernel, and how that deals out shared memory.

The kernel makes the same sums and checks that they come to as many bytes (SHARED_BYTES).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels.tune.problem import FEW_TOKENS

PIECES_FROM = 160
"""Tokens of a tile from which on it is multiplied in pieces; with 128 e4m3 takes 13 % longer, int8 up to 8 % less or as
long (bench/results/pieces_h200.json)."""
_MAX_SLOTS = 16
_RESERVED_SHARED = 1024
"""Shared memory the driver keeps for each resident CTA, in bytes (CUDA C++ Programming Guide, compute 8.0 on)."""
_MAX_GATHERED = 3
_GATHER_BYTES = 128 << 10
"""What the rings of a multiprocessor hold at the least, in bytes."""


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
    def bytewise(self) -> bool:
        """Whether activations are quantised to e4m3 or int8, so that the tensor cores multiply bytes."""
        return self.activations is not Activations.NATIVE

    @property
    def rows(self) -> int:
        """Output rows."""
        return 64 * self.row_groups

    @property
    def few(self) -> bool:
        """Whether mma.sync multiplies (`multiply_few`), unless batch invariance forbids it."""
        return (self.tokens <= FEW_TOKENS or self.channel_groups > 1) and not self.bytewise

    @property
    def turns(self) -> int:
        """Warpgroups that take the blocks of an item in turn, with few tokens."""
        return self.row_groups * self.channel_groups if self.few else 1

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * (self.row_groups * self.channel_groups + 1)

    @property
    def registers(self) -> int:
        """What the kernel gives a thread that multiplies: an even share, and what those that copy can spare."""
        evenly = 65536 // (self.resident * self.threads) // 8 * 8
        copying = 128 * (48 if self.resident == 1 else 32 if self.row_groups > 1 and self.tokens > FEW_TOKENS else 40)
        return min(240, (evenly * self.threads - copying) // (self.threads - 128) // 8 * 8)

    @property
    def grouped(self) -> bool:
        """Whether scales in groups have this tile: registers hold a second set of sums, or pieces of one."""
        if self.tokens > 128:
            return self.in_pieces
        return self.registers - self.tokens >= 64

    @property
    def in_pieces(self) -> bool:
        """Whether the kernel multiplies pieces of the tokens where a row has one scale in a block, or tokens have one
        (sm90_multiply_pieces.cuh). With scales of both, ptxas spills for some tiles that have fewer than 256 tokens."""
        if not self.bytewise or self.tokens < PIECES_FROM or self.threads != 384 or self.resident > 1:
            return False
        return self.tokens % (32 if self.activations.group_size is None else 128) == 0

    @property
    def static_bytes(self) -> int:
        """The bytes of barriers, and of the scales of 8-bit activations, up to the alignment of the rings."""
        return 2048 if self.bytewise and self.tokens > 128 else 1024

    @property
    def fast_sums(self) -> bool:
        """Whether products of e4m3 are all added by the tensor cores, with about 14 bits (`multiply_bytes`)."""
        return self.activations is Activations.E4M3 and self.tokens > 128

    def weight_slot_bytes(self, bits: int, scale_bytes: int) -> int:
        """Return the bytes of a slot of packed weights and their scales."""
        return self.row_groups * (1024 * bits + 64 * scale_bytes)

    @property
    def x_slots_of_block(self) -> int:
        """Slots that the activations of one block of 128 channels take."""
        return 1 if self.tokens <= 64 or self.bytewise else 2

    @property
    def x_slot_bytes(self) -> int:
        """The bytes of a slot of activations."""
        return self.tokens * (128 if self.bytewise else 256) // self.x_slots_of_block

    @property
    def x_scale_bytes(self) -> int:
        """The bytes of the scales that come with a slot of activations, where those have some for each block."""
        return 0 if self.activations.group_size is None else 4 * self.tokens

    @property
    def exchange_bytes(self) -> int:
        """The bytes in which warpgroups hand their sums over, or many tokens' results are turned."""
        if self.tokens > 64:
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
        weight, x = self.weight_slot_bytes(bits, scale_bytes), self.x_slot_bytes + self.x_scale_bytes
        depth = min(_MAX_SLOTS, max(3, budget // (weight + self.x_slots_of_block * x))) // self.turns * self.turns
        x_depth = min(_MAX_SLOTS, (budget - depth * weight) // x) // self.x_slots_of_block * self.x_slots_of_block
        if self.few:
            x_depth = depth  # multiply_few counts both rings as one
        left = budget - depth * weight - x_depth * x
        return Slots(depth, x_depth, min(self.gathered - 1, left // self.part_bytes))

    def shared_bytes(self, bits: int, scale_bytes: int, chip: Chip) -> int:
        """Return the dynamic shared memory of a CTA."""
        slots = self.slots(bits, scale_bytes, chip)
        rings = slots.weights * self.weight_slot_bytes(bits, scale_bytes)
        rings += slots.x * (self.x_slot_bytes + self.x_scale_bytes)
        return rings + self.exchange_bytes + slots.gather_room * self.part_bytes
