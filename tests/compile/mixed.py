"""Which kernels of mixed weights do the compile tests build? A few with every tile, in which levels of all kinds meet,
and those of experts likewise.

A level has the code of a dense kernel, in which formats and scales meet tiles (`catalogue`). What a level costs here
beside that is how much of what a CTA knows of its row set stays in registers.
"""

from __future__ import annotations

from typing import TypeAlias

from tersor.formats import get_scheme
from tersor.hardware import Chip
from tersor.kernels import mixed
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import experts as tune_experts
from tersor.kernels.tune import sm90
from tersor.kernels.tune.mixed import SHAPES
from tersor.layouts.packing import BYTEWISE, Packing, activations_of

_LEVELS = {
    "few": (("fp5_e2m2", None), ("uint4", 64)),
    "floats": (("fp4_e2m1", None), ("fp5_e2m2", None), ("fp6_e2m3", None), ("int8", None)),
    "integers": (("uint5", 128), ("int8", None)),
    "rows": (("fp6_e2m3", None), ("int8", None)),
    "eight bits": (("uint4", 128), ("int8", None)),
    "seven bits": (("uint4", 128), ("fp7_e3m3", None)),
    "small floats": (("fp4_e2m1", None), ("fp6_e2m3", None)),
}
KERNELS = (
    ("floats", "float16", (8, 1, 4, 1), 0),
    ("rows", "bfloat16", (8, 3, 1, 1), 1),
    ("floats", "bfloat16", (16, 1, 4, 1), 0),
    ("rows", "float16", (16, 3, 1, 1), 2),
    ("floats", "bfloat16", (32, 1, 4, 1), 0),
    ("rows", "float16", (32, 1, 4, 1), 3),
    ("few", "float16", (32, 2, 1, 1), 0),
    ("rows", "bfloat16", (32, 3, 1, 1), 1),
    ("integers", "float16", (48, 1, 1, 2), 1),
    ("few", "bfloat16", (64, 1, 1, 2), 0),
    ("rows", "float16", (64, 2, 1, 1), 4),
    ("rows", "bfloat16", (96, 2, 1, 1), 0),
    ("few", "float16", (128, 2, 1, 1), 1),
    ("rows", "bfloat16", (256, 2, 1, 1), 0),
    ("eight bits", "int8", (16, 1, 1, 2), 0),
    ("small floats", "float8_e4m3fn", (16, 2, 1, 1), 0),
    ("eight bits", "int8", (32, 1, 1, 2), 1),
    ("eight bits", "int8", (64, 1, 1, 2), 0),
    ("seven bits", "float8_e4m3fn", (64, 2, 1, 1), 1),
    ("eight bits", "int8", (96, 1, 1, 2), 0),
    ("eight bits", "int8_g128", (96, 1, 1, 2), 1),
    ("eight bits", "int8_g128", (128, 2, 1, 1), 0),
    ("eight bits", "int8", (128, 2, 1, 1), 0),
    ("seven bits", "float8_e4m3fn", (128, 2, 1, 1), 0),
    ("small floats", "float8_e4m3fn", (256, 2, 1, 1), 0),
    ("seven bits", "float8_e4m3fn", (256, 2, 1, 1), 1),
    ("eight bits", "int8", (256, 2, 1, 1), 0),
    ("eight bits", "int8_g128", (256, 2, 1, 1), 2),
)
"""Levels, decode target, tile (tokens, row groups, channel groups, resident CTAs), gate."""
EXPERTS = (
    ("floats", "bfloat16", (8, 2, 1, 2), 1),
    ("rows", "float16", (8, 1, 2, 2), 0),
    ("few", "float16", (8, 1, 4, 1), 2),
    ("floats", "bfloat16", (16, 2, 1, 2), 0),
    ("few", "bfloat16", (16, 1, 4, 1), 3),
    ("floats", "bfloat16", (32, 2, 1, 1), 1),
    ("rows", "float16", (32, 3, 1, 1), 0),
    ("floats", "bfloat16", (48, 3, 1, 1), 4),
    ("floats", "bfloat16", (80, 3, 1, 1), 1),
    ("rows", "bfloat16", (64, 2, 1, 1), 1),
    ("few", "float16", (96, 2, 1, 1), 0),
    ("floats", "bfloat16", (128, 2, 1, 1), 1),
    ("eight bits", "int8", (16, 1, 1, 2), 1),
    ("small floats", "float8_e4m3fn", (16, 2, 1, 1), 0),
    ("seven bits", "float8_e4m3fn", (32, 1, 1, 2), 1),
    ("eight bits", "int8", (64, 2, 1, 1), 0),
    ("seven bits", "float8_e4m3fn", (96, 1, 1, 2), 1),
    ("eight bits", "int8", (128, 2, 1, 1), 1),
    ("small floats", "float8_e4m3fn", (256, 2, 1, 1), 1),
)
"""The same of experts, in either product."""


def all_sources(chip: Chip) -> list[KernelSource]:
    """Return the kernels, with the rings that they have on a chip."""
    found = []
    for turn, (levels, target, (tokens, rows, channels, resident), gate) in enumerate(KERNELS):
        packings = tuple(Packing.of(get_scheme(*level), target) for level in _LEVELS[levels])
        tile = sm90.Tile(tokens, rows, channels, 1, resident, activations_of(packings[0].layout))
        result = ("float16", "bfloat16")[turn % 2] if target in BYTEWISE.values() else target
        found.append(mixed.source(packings, result, tile, chip, gate))
    for turn, (levels, target, (tokens, rows, channels, resident), gate) in enumerate(EXPERTS):
        packings = tuple(Packing.of(get_scheme(*level), target) for level in _LEVELS[levels])
        kind = activations_of(packings[0].layout)
        tile = sm90.Tile(tokens, rows, channels, 1, resident, kind)
        problems = [tune_experts.ExpertsProblem.of(one, (1, 128, 128), 1, 1, kind) for one in packings]
        configs = tuple(tune_experts.config(one, tile, chip) for one in problems)
        result = ("bfloat16", "float16")[turn % 2] if target in BYTEWISE.values() else target
        found.append(mixed.experts_source(packings, result, configs, gate, not gate and target == result))
    return found


Tiles: TypeAlias = set[tuple[bool, tuple[int, int, int, int]]]


def tiles_built() -> tuple[Tiles, Tiles]:
    """Return whether activations have 8 bits, and the tile, of all kernels: of linears, and of experts."""
    linears, experts = (
        {(target in BYTEWISE.values(), shape) for _, target, shape, _ in kernels} for kernels in (KERNELS, EXPERTS)
    )
    return linears, experts


def tiles_there() -> tuple[Tiles, Tiles]:
    """Return the same of all that there are."""
    linears, experts = (
        {(bytewise, shape) for bytewise, shapes in of.items() for shape in shapes}
        for of in (SHAPES, tune_experts.SHAPES)
    )
    return linears, experts
