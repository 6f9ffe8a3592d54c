"""Weights in every representation and layout, and what holds of each whatever was done to it.

What a weight decodes to does not say how it lies: terms that rows of it share (`layouts.ratios`) are made of its
scales, and nothing reads them back. So what comes out of an operation has to be, byte for byte, what its codes and
scales are when they are laid out anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tersor.compress import encode
from tersor.formats import Assignment, Mix, Outliers, Scheme, get_scheme
from tersor.layouts import STREAM, MixedWeight, PackedWeight, StackedMixedWeight, StackedWeight, gated
from tersor.layouts.packing import LAYOUTS, unsupported_reason

IC = 192
"""Input channels: one and a half blocks."""
FORMS: tuple[tuple[str, int | None, str | None, float | None], ...] = (
    ("fp6_e3m2", None, None, None),
    ("mxfp4_e2m1", None, None, None),
    ("int8", None, "float32", None),
    ("int4", 32, None, None),
    ("uint5", 96, "bfloat16", None),
    ("uint6", 64, None, None),
    ("uint3", None, None, None),
    ("lut3", None, None, None),
    ("fp6_e2m3", None, None, 4),
    ("uint4", 32, None, 10),
    ("lut3", None, None, 4),
)
"""Formats, group sizes, dtypes of scales, and percent of outliers."""


def _scheme(name: str, group: int | None, scale: str | None, percent: float | None) -> Scheme:
    found = get_scheme(name, group, scale)
    kept = None if percent is None else Outliers(percent, "float16")
    return Scheme(found.format, found.group_size, found.scale_dtype, kept)


SCHEMES = [_scheme(*form) for form in FORMS]
PLACED = [
    (scheme, layout)
    for scheme in SCHEMES
    for layout in (STREAM, *(name for name, to in LAYOUTS.items() if not unsupported_reason(scheme.dense, to)))
]
"""Schemes, and every layout that a weight in one may lie in."""
OF_EXPERTS = [one for one in PLACED if one[0].outliers is None and (one[1] != "tiles_bfloat16" or one[0].is_mx)]
"""Those that experts may have; tiles for both 16-bit dtypes differ in their tables alone."""
MIXES = {
    STREAM: Mix((get_scheme("fp6_e3m2"), get_scheme("uint3", 32), get_scheme("int8", 96))),
    "tiles_float16": Mix((get_scheme("fp5_e2m2"), get_scheme("uint4", 32), get_scheme("int8"))),
    "tiles_bfloat16": Mix((get_scheme("mxfp4_e2m1"), get_scheme("uint5", 96))),
    "tiles_float8_e4m3fn": Mix((get_scheme("uint4", 96), get_scheme("fp6_e3m2"))),
    "tiles_int8": Mix((get_scheme("uint4", 32), get_scheme("int8"), get_scheme("int3", 96), get_scheme("uint7", 96))),
    "tiles_int8_g128": Mix((get_scheme("uint4", 32), get_scheme("int8"))),
}
"""Layout -> levels that may lie in it."""


def named(placed: Sequence[tuple[Scheme, str]]) -> list[Any]:
    """Return cases of a test that are called by scheme and layout."""
    return [pytest.param(*one, id=f"{one[0].key()}-{one[1]}") for one in placed]


@functools.cache
def plain(rows: int, seed: int = 0) -> torch.Tensor:
    """Return random numbers, float32 [rows, IC], whose rows and groups are far apart in size."""
    generator = torch.Generator().manual_seed(97 * rows + seed)
    of_rows = (8 * torch.rand(rows, 1, generator=generator) - 4).exp2()
    of_groups = (4 * torch.rand(rows, IC // 32, generator=generator)).exp2().repeat_interleave(32, dim=1)
    return torch.randn(rows, IC, generator=generator) * of_rows * of_groups


@functools.cache
def stored(scheme: Scheme, rows: int, seed: int = 0) -> PackedWeight:
    """Return a random weight in the stored stream."""
    return PackedWeight.from_encoded(encode(plain(rows, seed), scheme))


@functools.cache
def mixed(mix: Mix, rows: int, seed: int = 0) -> MixedWeight:
    """Return a random mixed weight in the stored stream; weights of as many rows have the same levels."""
    drawn = torch.randint(len(mix.levels), (rows,), generator=torch.Generator().manual_seed(rows))
    return mixed_of(Assignment(mix, bytes(drawn.tolist())), seed)


def mixed_of(form: Assignment, seed: int) -> MixedWeight:
    """Return a random weight of these levels in the stored stream."""
    level = torch.tensor(list(form.level))
    sets = [
        PackedWeight.from_encoded(encode(plain(len(level), seed)[level == number], scheme))
        for number, scheme in enumerate(form.mix.levels)
        if form.rows[number]
    ]
    return MixedWeight.of(form, sets)


def to(layout: str) -> Callable[[Scheme], str]:
    """Return what chooses a layout for every level of a mix."""
    return lambda scheme: layout


def tensors_of(weight: PackedWeight | StackedWeight) -> list[torch.Tensor | None]:
    """Return what a weight is held in, in order."""
    return [weight.data, weight.scale, weight.zero_point, weight.outliers, weight.arranged]


def same(found: Any, wanted: Any) -> bool:
    """Whether two weights of one scheme have the same bytes in one layout."""
    if isinstance(found, MixedWeight | StackedMixedWeight):
        pairs = zip(found.sets, wanted.sets, strict=True)
        return found.assignment == wanted.assignment and all(same(*pair) for pair in pairs)
    pairs = zip(tensors_of(found), tensors_of(wanted), strict=True)
    return (found.layout, found.shape) == (wanted.layout, wanted.shape) and all(
        own is other if own is None or other is None else own.dtype == other.dtype and torch.equal(own, other)
        for own, other in pairs
    )


def check(found: PackedWeight, wanted: torch.Tensor, layout: str) -> None:
    """Hold that a weight lies in a layout, decodes to `wanted`, and is as one that was laid out anew."""
    assert found.layout == layout and found.shape == tuple(wanted.shape)
    assert torch.equal(found.dequantize(), wanted)
    assert same(found, found.to_layout(STREAM).to_layout(layout))


def check_gated(found: PackedWeight, gate: torch.Tensor, up: torch.Tensor, layout: str) -> None:
    """Hold the same of gate and up; the rows that fill up a block are nobody's."""
    halves = gated.separate(found.dequantize())
    assert torch.equal(halves[0], gate) and torch.equal(halves[1], up)
    check(found, found.dequantize(), layout)


def check_stack(found: StackedWeight, wanted: torch.Tensor, layout: str) -> None:
    """Hold the same of the weights [E, OC, IC] of experts."""
    assert found.shape == tuple(wanted.shape) and found.layout == layout
    assert torch.equal(found.dequantize(), wanted)
    for index, one in enumerate(wanted):
        check(found.expert(index), one, layout)


def check_mixed(found: MixedWeight | StackedMixedWeight, wanted: torch.Tensor, layout: str) -> None:
    """Hold the same of every row set; of gate and up `wanted` is what `separate` gives of it, one behind the other."""
    decoded = found.dequantize()
    if found.gated:
        decoded = torch.cat(gated.separate(decoded.movedim(-2, 0))).movedim(0, -2)
    assert torch.equal(decoded, wanted)
    for one in found.sets:
        if isinstance(one, StackedWeight):
            check_stack(one, one.dequantize(), layout)
        else:
            check(one, one.dequantize(), layout)
