"""Which tiles has the kernel of pruned weights, and how does one run a product?"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tersor.hardware import Chip
from tersor.layouts.blocks import UNIT_OC
from tersor.layouts.sparse_cuts import CUT_UNITS

TOKENS = (8, 16, 32, 64, 128, 256)
"""Tokens of tiles; one that has fewer takes a product of all tokens, others several of them in turn."""
SHAPES = ((1, 4, 64), (2, 2, 64), (2, 1, 128), (4, 1, 64))
"""Row groups, CTAs of a multiprocessor, layers of a ring; up to 64 tokens. The first of tiles as good is taken."""
MANY_SHAPES = ((2, 1, 64),)
"""The same of more tokens."""
_LAYER_BYTES = 512
_MIRRORED = 2
_MASK_BYTES = 1024
_STORE_BYTES = 8192
_STATIC_BYTES = 1024
_TURNED_BYTES = 9216
_RESERVED = 1024
_MOST_SLOTS = 12
_MOST_X_SLOTS = 8
_LEAST_SLOTS = 4
MOST_OF_BYTES = 128
FEW = 64
"""Tokens up to which a slot of activations has a whole block, and results need no room."""


@dataclass(frozen=True, slots=True)
class SparseTile:
    """A compiled shape of the kernel (sm90_sparse.cuh).

    Attributes:
        tokens: of a tile.
        row_groups: warpgroups that multiply, each 64 output rows.
        resident: CTAs that fit on a multiprocessor.
        layers: of values in the ring of a row group, a power of two from 64 on.
        masks, x_slots: slots of masks and of activations.
        bytewise: whether activations are bytes.
    """

    tokens: int
    row_groups: int
    resident: int
    layers: int
    masks: int
    x_slots: int
    bytewise: bool = False

    def __str__(self) -> str:
        of = "b" if self.bytewise else ""
        return f"{self.rows}x{self.tokens}r{self.resident}l{self.layers}s{self.masks}x{self.x_slots}{of}"

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
    def x_bytes(self) -> int:
        """Bytes of a slot of activations: a block's, or half a block's."""
        return _x_bytes(self.tokens, self.bytewise)

    @property
    def slot_bytes(self) -> int:
        """Shared memory without the rings of values."""
        slots = self.x_slots * self.x_bytes + self.masks * self.row_groups * _MASK_BYTES
        return slots + _store_bytes(self.tokens, self.row_groups)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return self.slot_bytes + self.row_groups * (self.layers + _MIRRORED) * _LAYER_BYTES

    @property
    def neighbours(self) -> int:
        """Row tiles that have the same blocks where a weight is cut."""
        return CUT_UNITS // self.row_groups

    def token_tiles(self, n: int) -> int:
        """Return the tiles that n tokens make."""
        return -(-n // self.tokens)

    def share(self, n: int) -> int:
        """Return the tokens of a tile where n tokens are dealt out evenly: the last one may have fewer."""
        return -(-n // self.token_tiles(n))


@dataclass(frozen=True, slots=True)
class SparseConfig:
    """How the kernel runs a problem.

    Attributes:
        tile: the compiled shape.
        places: of the weight's layout, to which blocks are dealt out, or 0 where tiles are whole.
        ctas: CTAs launched: as many for each place, where there are places.
    """

    tile: SparseTile
    places: int
    ctas: int

    def __str__(self) -> str:
        return f"{self.tile}, {self.ctas} CTAs" + (f" at {self.places} places" if self.places else "")

    @property
    def place_ctas(self) -> int:
        """CTAs of a place, or 0."""
        return self.ctas // self.places if self.places else 0

    def floats(self, oc: int, n: int = 1) -> tuple[int, int]:
        """Return the float32 sums and the counters that places exchange through memory; zero where none do."""
        if not self.places:
            return 0, 0
        tiles = self.tile.neighbours * self.tile.token_tiles(n)
        return 2 * self.places * tiles * self.tile.part_bytes // 4, -(-oc // (CUT_UNITS * UNIT_OC)) * tiles


def tile_for(
    tokens: int, chip: Chip, *, row_groups: int = 2, resident: int = 1, layers: int = 128, bytewise: bool = False
) -> SparseTile:
    """Return a tile with as many slots as its shared memory has room for.

    Raises:
        ValueError: shared memory has not room for four slots of each kind.
    """
    room = _room(chip, row_groups, resident, layers) - _STATIC_BYTES - _store_bytes(tokens, row_groups)
    mask_bytes, x_bytes = row_groups * _MASK_BYTES, _x_bytes(tokens, bytewise)
    if tokens <= FEW or bytewise:
        masks = x_slots = min(_MOST_SLOTS, room // (x_bytes + mask_bytes))
    else:
        x_slots = min(_MOST_X_SLOTS, (room - _LEAST_SLOTS * mask_bytes) // x_bytes) // 2 * 2
        masks = min(_MOST_SLOTS, (room - x_slots * x_bytes) // mask_bytes)
    if min(masks, x_slots) < _LEAST_SLOTS:
        raise ValueError(f"tiles of {64 * row_groups} rows and {tokens} tokens have no room for {layers} layers")
    return SparseTile(tokens, row_groups, resident, layers, masks, x_slots, bytewise)


@functools.cache
def decompress_tile(chip: Chip) -> SparseTile:
    """Return the tile of the kernel that decodes for cuBLAS (sm90_decompress.cuh)."""
    row_groups, resident, layers = 1, 4, 64
    room = _room(chip, row_groups, resident, layers) - _STATIC_BYTES - _TURNED_BYTES - _x_bytes(TOKENS[0], False)
    return SparseTile(TOKENS[0], row_groups, resident, layers, min(_MOST_SLOTS, room // _MASK_BYTES), 1)


@functools.cache
def tiles(tokens: int, bits: int, chip: Chip, bytewise: bool = False) -> tuple[SparseTile, ...]:
    """Return the tiles of so many tokens that shared memory has room for, for values of so many bits.

    Of bytes, whose sums are held twice, there are none of more than 128 tokens.
    """
    found: list[SparseTile] = []
    if bytewise and tokens > MOST_OF_BYTES:
        return ()
    for row_groups, resident, layers in SHAPES if tokens <= FEW else MANY_SHAPES:
        if bytewise and tokens <= FEW and resident == 1:  # several CTAs have room for bytes
            continue
        if bits == 16 and layers < 128 and tokens <= FEW:  # where half of the weights are left the ring runs dry
            continue
        try:
            shape = {"row_groups": row_groups, "resident": resident, "layers": layers}
            found.append(tile_for(tokens, chip, **shape, bytewise=bytewise))
        except ValueError:
            continue
    return tuple(found)


def config(tile: SparseTile, oc: int, places: int, chip: Chip, n: int = 1) -> SparseConfig:
    """Return how a tile runs n tokens with a weight [oc, ...]: dealt out to its places, or with 0 whole tiles."""
    if places:
        return SparseConfig(tile, places, places * min(tile.resident, tile.neighbours * tile.token_tiles(n)))
    items = -(-oc // tile.rows) * tile.token_tiles(n)
    return SparseConfig(tile, 0, min(items, chip.sms * tile.resident))


def _room(chip: Chip, row_groups: int, resident: int, layers: int) -> int:
    """Return the shared memory that a CTA has beside the rings of values."""
    return (chip.shared_bytes + _RESERVED) // resident - _RESERVED - row_groups * (layers + _MIRRORED) * _LAYER_BYTES


def _x_bytes(tokens: int, bytewise: bool) -> int:
    return tokens * (256 if tokens <= FEW and not bytewise else 128)


def _store_bytes(tokens: int, row_groups: int) -> int:
    return 0 if tokens <= FEW else row_groups * _STORE_BYTES
