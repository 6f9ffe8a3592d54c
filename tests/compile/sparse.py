"""Which kernels of pruned weights do the compile tests build? Every tile once, kinds of values by turns.

What values are decides how many registers an expansion holds, what a tile is how many there are: every kind meets a
tile of few tokens and one of many.
"""

from __future__ import annotations

import itertools

from tersor.formats import Plain, Sparse, get_scheme
from tersor.hardware import Chip
from tersor.kernels import sparse
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import sparse as tune
from tersor.layouts.sparse_packing import FP8, SparsePacking

_KINDS = (
    ("fp6_e3m2", "float16"),
    ("fp8_e4m3", "bfloat16"),
    ("int8", "float16"),
    ("bfloat16", "bfloat16"),
    ("fp8_e4m3", "float16"),
    ("int8", "bfloat16"),
    ("float16", "float16"),
)


def packings() -> list[SparsePacking]:
    """Return a packing of every kind, those that are converted and those that are not."""
    found = []
    for name, target in _KINDS:
        values = name if name == target else get_scheme(name)
        found += [SparsePacking.choices(values, target)[0], SparsePacking.choices(values, target)[-1]]
    return list(dict.fromkeys(found))


def all_sources(chip: Chip) -> list[KernelSource]:
    """Return the kernels that multiply, with the tiles of a chip, and those that decode for cuBLAS."""
    turns, gates, found = itertools.cycle(packings()), itertools.cycle((0, 1, 0, 2, 3)), []
    for tokens in tune.TOKENS:
        for tile in tune.tiles(tokens, 8, chip):
            packing = next(turns)
            while tile not in tune.tiles(tokens, packing.bits, chip):
                packing = next(turns)
            found.append(sparse.sparse_source(packing, tile, next(gates)))
    found += of_bytes(chip)
    found += [sparse.decompress_source(packing, tune.decompress_tile(chip)) for packing in packings()[::2]]
    return found + stored()


def of_bytes(chip: Chip) -> list[KernelSource]:
    """Return the kernels that multiply activations in e4m3: every tile once; values are alike."""
    packing, gates = SparsePacking.of(get_scheme("fp6_e3m2"), FP8), itertools.cycle((0, 1, 2))
    results = itertools.cycle(("float16", "bfloat16"))
    return [
        sparse.sparse_source(packing, tile, next(gates), next(results))
        for tokens in tune.TOKENS
        for tile in tune.tiles(tokens, 8, chip, bytewise=True)
    ]


def stored() -> list[KernelSource]:
    """Return kernels that decode weights as they are stored: numbers and scales of every kind."""
    kinds = (
        (Plain("float32"), "float16"),
        (Plain("float16"), "bfloat16"),
        (Plain("bfloat16"), "float16"),
        (get_scheme("uint3", 32), "bfloat16"),
        (get_scheme("int8"), "float16"),
        (get_scheme("mxfp6_e2m3"), "bfloat16"),
    )
    return [sparse.stored_source(Sparse(values), target) for values, target in kinds]


def tiles_built(chip: Chip) -> set[str]:
    """Return the tiles that kernels which multiply are built with, by name."""
    names = {str(tile) for tokens in tune.TOKENS for way in (False, True) for tile in tune.tiles(tokens, 8, chip, way)}
    return {name for name in names if any(name in source.name for source in all_sources(chip))}
