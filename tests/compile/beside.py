"""Which kernels that add outliers do the compile tests build? Every tile of few tokens; the rest by turns."""

from __future__ import annotations

import itertools

from tersor.formats import get_scheme
from tersor.hardware import Chip
from tersor.kernels import dense
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import MOST_NORMED, sm90
from tersor.layouts import decode_groups
from tersor.layouts.packing import Packing

_FORMATS = (("int4", 128), ("fp4_e2m1", None), ("uint3", 64), ("fp6_e2m3", None), ("uint4", 128))


def all_sources(chip: Chip) -> list[KernelSource]:
    """Return them for a chip of compute capability 9.0."""
    formats = itertools.cycle(_FORMATS)
    dtypes = itertools.cycle(itertools.product(decode_groups.PAIR_TARGETS, decode_groups.PAIR_TARGETS))
    found = []
    for tile in (tile for tile in sm90.tiles(0) if tile.tokens <= MOST_NORMED):
        (name, size), (dtype, kept) = next(formats), next(dtypes)
        packing = Packing.of(get_scheme(name, size), dtype)
        if tile not in sm90.tiles(packing.scales_in_block):
            packing = Packing.of(get_scheme(name), dtype)
        bits, row_bytes = packing.scheme.format.bits, packing.scale_row_bytes
        slots, shared = tile.slots(bits, row_bytes, chip), tile.shared_bytes(bits, row_bytes, chip)
        found.append(dense.sm90_source(packing, dtype, tile, slots, shared, outliers=kept))
    return found
