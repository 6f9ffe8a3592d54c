"""Which kernels of weights with tables do the compile tests build? A tile of each kind; the rest by turns.

A lane holds the tables of its two rows in eight registers, of each of its row groups where tokens are few.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from compile import mixtures
from compile.pairing import alike

from tersor.formats import Scheme, get_scheme
from tersor.hardware import Chip
from tersor.kernels import dense
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import MOST_NORMED, ROUND_ROW_BYTES, sm80, sm90, tile_takes_outliers
from tersor.layouts import decode_groups
from tersor.layouts.packing import Packing

FORMAT = "lut3"


def scheme(dtype: str) -> Scheme:
    """Return the scheme whose tables meet activations of a dtype."""
    return get_scheme(FORMAT, None, dtype)


def all_sources(chip: Chip) -> list[KernelSource]:
    """Return them for a chip; those of compute capability 9.0 have a schedule of their own."""
    packings = [Packing.of(scheme(dtype), dtype) for dtype in decode_groups.PAIR_TARGETS]
    if chip.capability != (9, 0):
        return [dense.dequantize_source(packings[0]), *(_older(packing, chip) for packing in packings)]
    return [dense.dequantize_source(packings[1]), *_linears(chip), *_experts(chip)]


def _older(packing: Packing, chip: Chip) -> KernelSource:
    """Return the widest tile of the sm80 schedule."""
    tokens, bits = max(sm80.TILES), packing.scheme.format.bits
    depth, _ = sm80.stages(tokens, bits, packing.scale_row_bytes, chip)
    return dense.sm80_source(packing, tokens, depth, depth * sm80.stage_bytes(tokens, bits, packing.scale_row_bytes))


def _linears(chip: Chip) -> Iterator[KernelSource]:
    """Yield a kernel of every tile that differs from others in more than tokens."""
    gates = itertools.cycle((0, 1, 0, 3, 0))
    more = itertools.cycle((dense.Norm.NONE, dense.Norm.IN, None, dense.Norm.OUT, None))  # `None`: outliers
    tiles = {alike(tile): tile for tile in sm90.tiles(0)}
    for turn, tile in enumerate(tiles.values()):
        dtype, gate, norm, rounds = decode_groups.PAIR_TARGETS[turn % 2], next(gates), dense.Norm.NONE, 0
        packing = Packing.of(scheme(dtype), dtype)
        if tile.tokens <= MOST_NORMED:
            gate, found = 0, next(more)
            norm, rounds = found or dense.Norm.NONE, int(found is None and tile_takes_outliers(tile, 1, 0, True))
        bits, row_bytes = packing.scheme.format.bits, packing.scale_row_bytes + ROUND_ROW_BYTES * rounds
        slots, shared = tile.slots(bits, row_bytes, chip), tile.shared_bytes(bits, row_bytes, chip)
        yield dense.sm90_source(packing, dtype, tile, slots, shared, gate, norm=norm, outliers=rounds)


def _experts(chip: Chip) -> Iterator[KernelSource]:
    """Yield kernels of experts, of few tokens and of many, both products."""
    tiles = (sm90.Tile(8, 1, 4, 1, 1), sm90.Tile(32, 2, 1, 1, 2), sm90.Tile(128, 2, 1, 1, 1))
    for tile, dtype, gate in zip(tiles, ("float16", "bfloat16", "float16"), (1, 0, 2), strict=True):
        kernel = mixtures.Traits(tile, FORMAT, dtype, gate, None, dtype)
        assert kernel.exists(), kernel
        yield kernel.source(chip)
