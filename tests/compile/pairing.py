"""Kernels chosen so that their traits meet two by two, and which tiles count as alike for that."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TypeAlias, TypeVar

from tersor.kernels.tune import sm90

GROUP_SIZES = (None, 128, 64, 32, 16)

Pair: TypeAlias = tuple[object, object]
Kernel = TypeVar("Kernel")


def width(tile: sm90.Tile) -> int:
    """Return a tile's tokens, up to a power of two."""
    return 1 << (tile.tokens - 1).bit_length()


def alike(tile: sm90.Tile | int) -> sm90.Tile | int:
    """Return what stands for all tiles that differ in tokens alone, between the same two powers of two."""
    return tile if isinstance(tile, int) else replace(tile, tokens=width(tile))


def choose(options: Mapping[Kernel, frozenset[Pair]], wanted: Collection[Pair], met: set[Pair]) -> list[Kernel]:
    """Return kernels in which all wanted pairs meet, one at a time what has most of those that are missing.

    Args:
        options: kernel -> the pairs that meet in it.
        wanted: pairs that have to meet; each does in one of the options.
        met: pairs that met already; those of what is chosen are added.
    """
    chosen = []
    while missing := set(wanted) - met:
        best, found = max(options.items(), key=lambda item: (len(item[1] & missing), len(item[1] - met)))
        chosen.append(best)
        met.update(found)
    return chosen
