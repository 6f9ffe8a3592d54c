"""Which kernels that add outliers do the compile tests build? Tiles of few tokens and the widest; the rest by turns.

And of those that decode a weight with its outliers every kind of scale, and a table.
"""

from __future__ import annotations

import itertools

from tersor.formats import get_scheme
from tersor.hardware import Chip
from tersor.kernels import dense
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import ROUND_ROW_BYTES, sm90, tile_takes_outliers
from tersor.layouts import decode_groups
from tersor.layouts.packing import Packing

_FORMATS = (("int4", 128), ("fp4_e2m1", None), ("uint3", 64), ("fp6_e2m3", None), ("uint4", 128), ("fp6_e3m2", None))
_ROUNDS = (1, 1, 2, 1, 8)


def tiles() -> list[sm90.Tile]:
    """Return the tiles that can have them, of more than 64 tokens those of 128, which have the most sums."""
    found = [tile for tile in sm90.tiles(0) if tile_takes_outliers(tile, 1, 0, False)]
    return [tile for tile in found if tile.tokens <= 64 or tile.tokens == 128]


def all_sources(chip: Chip) -> list[KernelSource]:
    """Return them for a chip of compute capability 9.0."""
    formats, rounds = itertools.cycle(_FORMATS), itertools.cycle(_ROUNDS)
    found = []
    for tile, dtype in zip(tiles(), itertools.cycle(decode_groups.PAIR_TARGETS)):
        (name, size), count = next(formats), next(rounds)
        packing = Packing.of(get_scheme(name, size), dtype)
        groups = packing.scales_in_block
        if tile not in sm90.tiles(groups) or not tile_takes_outliers(tile, 1, groups, False):
            packing, groups = Packing.of(get_scheme(name), dtype), 0
        count = count if tile_takes_outliers(tile, count, groups, False) else 1
        bits, row_bytes = packing.scheme.format.bits, packing.scale_row_bytes + ROUND_ROW_BYTES * count
        slots, shared = tile.slots(bits, row_bytes, chip), tile.shared_bytes(bits, row_bytes, chip)
        found.append(dense.sm90_source(packing, dtype, tile, slots, shared, outliers=count))
    return [*found, *_decoding()]


def _decoding() -> list[KernelSource]:
    """Return kernels that decode weights with outliers for cuBLAS."""
    forms = [(get_scheme(*form), dtype) for form, dtype in zip(_FORMATS, itertools.cycle(decode_groups.PAIR_TARGETS))]
    forms.append((get_scheme("lut3", None, "bfloat16"), "bfloat16"))
    packings = [Packing.of(scheme, dtype) for scheme, dtype in forms]
    return [dense.dequantize_source(packing, count) for packing, count in zip(packings, itertools.cycle(_ROUNDS))]
