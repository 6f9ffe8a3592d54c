"""How is a weight matrix represented? An element format, who shares a scale, and the scale's dtype."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tersor.errors import FormatError, did_you_mean
from tersor.formats.dtypes import FLOAT_DTYPES
from tersor.formats.element import LUTS, ElementFormat, get, names
from tersor.formats.outliers import Outliers

SCALE_DTYPES: dict[str, torch.dtype] = {**FLOAT_DTYPES, "e8m0": torch.uint8}
"""Scale dtype name -> dtype it is stored in. An `e8m0` byte b means 2^(b-127) (OCP Microscaling v1.0, section 5.4)."""

_E8M0_BIAS = 127
_E8M0_SMALLEST = 0x00400000
"""The bits of float32 2^-127, a subnormal; every larger power of two is its exponent field alone."""

TABLE_DTYPES = ("float16", "bfloat16")
"""What the numbers of a row's table may be: those that the tensor cores multiply as they are."""

_MX_GROUP = 32

ROW_ELEMENTS = 32
"""A stored row is padded to a multiple of this many elements, so that it ends with a 32-bit word in every format."""


class ScaleError(FormatError):
    """Weights that a scale of the chosen dtype cannot stand for; `row` is their row in the tensor handed in.

    `reason` says what is wrong, with `{row}` where the row's number belongs.
    """

    def __init__(self, row: int, reason: str) -> None:
        self.row = row
        self.reason = reason
        super().__init__(reason.format(row=row))


@dataclass(frozen=True, slots=True)
class Scheme:
    """An element format with its scales: weight[oc, ic] = scale[oc, ic // group_size] * decode(code[oc, ic]).

    Of a `lut` format the scales of a row are its table, which rises: weight[oc, ic] = scale[oc, code[oc, ic]].

    Attributes:
        format: the element format.
        group_size: consecutive IC elements that share a scale; `None` is one scale a row, or a table.
        scale_dtype: a key of `SCALE_DTYPES`; of a table one of `TABLE_DTYPES`.
        outliers: which weights are kept as they are beside the codes; `None` is none.
    """

    format: ElementFormat
    group_size: int | None = None
    scale_dtype: str = "float16"
    outliers: Outliers | None = None

    @property
    def dense(self) -> Scheme:
        """The scheme of the codes alone, without outliers."""
        return self if self.outliers is None else replace(self, outliers=None)

    @property
    def name(self) -> str:
        """The name a user gives: `mx...` for an OCP Microscaling block format, else the element format's."""
        if self.is_mx:
            return f"mx{self.format.name}"
        return self.format.name

    @property
    def is_mx(self) -> bool:
        """Whether this is a block of 32 elements with an E8M0 scale."""
        return self.group_size == _MX_GROUP and self.scale_dtype == "e8m0"

    @property
    def has_zero_point(self) -> bool:
        """Whether a uint8 zero point stands beside each scale."""
        return self.format.kind == "uint"

    @property
    def has_table(self) -> bool:
        """Whether the scales of a row are a table that codes choose from."""
        return self.format.kind == "lut"

    def groups(self, ic: int) -> int:
        """Return how many scales a row of `ic` elements has, of a table its numbers.

        Raises:
            FormatError: the group size does not divide `ic`.
        """
        if self.has_table:
            return 1 << self.format.bits
        if self.group_size is None:
            return 1
        if ic % self.group_size:
            raise FormatError(f"group size {self.group_size} does not divide the {ic} input channels")
        return ic // self.group_size

    def scale_bits(self, ic: int) -> int:
        """Return stored bits of all scales, and zero points, of a row of `ic` elements."""
        return self.groups(ic) * (SCALE_DTYPES[self.scale_dtype].itemsize * 8 + (8 if self.has_zero_point else 0))

    def bits_per_weight(self, ic: int) -> float:
        """Return stored bits for each weight of a row of `ic` elements, scales, padding and outliers counted."""
        padded = -(-ic // ROW_ELEMENTS) * ROW_ELEMENTS
        kept = 0 if self.outliers is None else 32 * self.outliers.per_row(ic)
        return (padded * self.format.bits + self.scale_bits(ic) + kept) / ic

    def key(self) -> str:
        """Return a short text that names the scheme exactly: `fp6_e3m2:g128:float16`, with outliers behind it."""
        group = "row" if self.group_size is None else f"g{self.group_size}"
        beside = "" if self.outliers is None else f":{self.outliers.key()}"
        return f"{self.format.name}:{group}:{self.scale_dtype}{beside}"

    @staticmethod
    @functools.cache
    def from_key(key: str) -> Scheme:
        """Return the scheme `key()` named."""
        name, group, scale_dtype, *beside = key.split(":")
        outliers = Outliers.from_key(*beside) if beside else None
        return Scheme(get(name), None if group == "row" else int(group[1:]), scale_dtype, outliers)


def get_scheme(
    name: str, group_size: int | None = None, scale_dtype: str | None = None, table_dtype: str = "float16"
) -> Scheme:
    """Return the scheme for a format name as users write it.

    Args:
        name: an element format (`fp6_e3m2`), or `mx` and one (`mxfp6_e3m2`: groups of 32 with E8M0 scales).
        group_size: elements that share a scale; `None` is one scale a row (for `mx...`: 32), or a table.
        scale_dtype: `float16` (default), `bfloat16`, `float32` or `e8m0`; of tables the first two.
        table_dtype: what tables are in where no scale dtype is asked for: that of the activations that they will meet.

    Raises:
        FormatError: unknown names, or options that contradict an `mx` format.
    """
    if not isinstance(name, str):
        raise FormatError(f"format {name!r} is not a name such as 'fp6_e3m2'")
    if ":" in name:
        bare = name.partition(":")[0]
        raise FormatError(
            f"format {name!r} says more than a format: give {bare!r}, and group size and scale dtype apart"
        )
    if scale_dtype is not None and scale_dtype not in SCALE_DTYPES:
        near = did_you_mean(str(scale_dtype), SCALE_DTYPES)
        raise FormatError(f"unknown scale dtype {scale_dtype!r}{near} (known: {', '.join(SCALE_DTYPES)})")
    group_size = _checked_group_size(group_size)
    if name.startswith("mx"):
        if group_size not in (None, _MX_GROUP) or scale_dtype not in (None, "e8m0"):
            raise FormatError(
                f"{name} has groups of {_MX_GROUP} with e8m0 scales, not group size {group_size} with "
                f"{scale_dtype or 'e8m0'} scales: use {name[2:]} for other scales"
            )
        try:
            element = get(name[2:])
        except FormatError:
            known = ", ".join(scheme_names())
            raise FormatError(
                f"unknown format {name!r}{did_you_mean(name, scheme_names())} (formats: {known})"
            ) from None
        if element.kind in ("uint", "lut"):
            has = "zero point" if element.kind == "uint" else "table"
            raise FormatError(f"unknown format {name!r}: a Microscaling block has no {has}")
        return Scheme(element, _MX_GROUP, "e8m0")
    element = get(name)
    if element.kind == "lut" and group_size is not None:
        raise FormatError(
            f"{name} has a table for each row, no groups of {group_size}: leave the group size out, or write row in an "
            "override"
        )
    if element.kind == "lut" and scale_dtype not in (None, *TABLE_DTYPES):
        raise FormatError(f"tables of {name} are {' or '.join(TABLE_DTYPES)}, not {scale_dtype}")
    if element.kind == "uint" and scale_dtype == "e8m0":
        raise FormatError(f"{name} has a zero point, which e8m0 scales do not take: use int{element.bits}")
    return Scheme(element, group_size, scale_dtype or (table_dtype if element.kind == "lut" else "float16"))


def _checked_group_size(group_size: Any) -> int | None:
    """Return a group size as an `int`; `None` is one scale a row.

    Raises:
        FormatError: not a positive whole number; the message says what stands for one scale a row.
    """
    if group_size is None:
        return None
    try:
        size = 0 if isinstance(group_size, bool) else operator.index(group_size)
    except TypeError:
        size = 0
    if size < 1:
        raise FormatError(
            f"group size {group_size!r} is not a positive whole number of input channels: for one scale a row leave "
            "it out, or write row in an override"
        )
    return size


def scheme_names() -> tuple[str, ...]:
    """Return every name `get_scheme` is commonly called with."""
    return (*names(), *LUTS, "mxfp8_e4m3", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4_e2m1", "mxint8")


def scale_values(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return stored scales, or tables, [OC, G] as float32 numbers."""
    if scheme.scale_dtype == "e8m0":
        exponent = scale.to(torch.int32)
        return torch.where(exponent == 0, _E8M0_SMALLEST, exponent << 23).view(torch.float32)
    return scale.to(torch.float32)


def store_scales(wanted: torch.Tensor, scheme: Scheme, *, fits: bool = False) -> torch.Tensor:
    """Round wanted scales to the scheme's scale dtype.

    A positive scale never becomes zero: it is at least the dtype's smallest positive number, so that a row of tiny
    weights does not vanish. E8M0 takes the next power of two up, so that no element saturates; a group of zeros gets
    the smallest.

    Args:
        wanted: float32 [OC, G], not negative.
        scheme: names the dtype.
        fits: whether none is beyond the dtype's maximum; else that is looked at, which waits for a GPU.

    Returns:
        [OC, G] in `SCALE_DTYPES[scheme.scale_dtype]`.

    Raises:
        ScaleError: a scale is beyond the dtype's maximum; it names the row.
    """
    if scheme.scale_dtype == "e8m0":
        mantissa, exponent = torch.frexp(wanted)
        power = exponent - (mantissa == 0.5).to(exponent.dtype)
        power = torch.where(wanted > 0, power, -_E8M0_BIAS)
        if not fits and int(power.max()) > _E8M0_BIAS:
            largest = float(wanted.max())
            raise ScaleError(_row(wanted), f"a scale of {largest:.3g} in row {{row}} is beyond e8m0's largest, 2^127")
        return (power.clamp_min(-_E8M0_BIAS) + _E8M0_BIAS).to(torch.uint8)
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    info = torch.finfo(dtype)
    if not fits and wanted.numel() and float(wanted.max()) > info.max:
        raise ScaleError(
            _row(wanted),
            f"a scale of {float(wanted.max()):.3g} in row {{row}} is beyond {scheme.scale_dtype}'s largest, "
            f"{info.max:g}: use bfloat16 or float32 scales (--scale-dtype)",
        )
    stored = wanted.to(dtype)
    vanished = (stored == 0) & (wanted > 0)
    return torch.where(vanished, torch.full_like(stored, info.smallest_normal * info.eps), stored)


def _row(wanted: torch.Tensor) -> int:
    return int(wanted.amax(dim=1).argmax())
