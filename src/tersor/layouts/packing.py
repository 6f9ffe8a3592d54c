"""What does a scheme mean for kernels that decode it for one target? Worked out once, as a value.

A target is the dtype of the activations that decoded weights meet (`decode_groups.TARGETS`). Layouts, kernels, tile
choice and operators all take a `Packing` instead of asking the scheme again.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from tersor.errors import FormatError
from tersor.formats import SCALE_DTYPES, Activations, Scheme
from tersor.layouts import decode_groups, ratios
from tersor.layouts.blocks import BLOCK_IC, ic_blocks, oc_blocks
from tersor.layouts.decode_groups import DecodeGroup

LAYOUTS = {f"tiles_{target}": target for target in decode_groups.TARGETS}
"""Layout name -> decode target: the tables, and so the order of bits, differ with it."""

SCALE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "e8m0": 3}
"""Scale dtype -> SCALE_TYPE of scales.cuh."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A scheme in kernel tiles for one target; `Packing.of` makes it.

    Attributes:
        scheme: element format and scales.
        target: the decode target, a key of `decode_groups.TARGETS`.
        group: the decode group: which packed bits become which registers.
        scales_in_block: scales that a row has in a block of 128 input channels; 0 for one scale a row.
        scale_bytes: bytes that one scale takes in tiles, its zero point included; of tables those of a row.
        scale_row_bytes: bytes that the scales of a row take in a block; 0 for one scale, or table, a row, which lies
            elsewhere.
        by_ratios: whether codes in groups are decoded to int8 of the whole row (`ratios`), whose terms lie ahead of the
            scales of all blocks.
        factor: what sums of decoded codes are multiplied by, beside the scales.
    """

    scheme: Scheme
    target: str
    group: DecodeGroup
    scales_in_block: int
    scale_bytes: int
    scale_row_bytes: int
    by_ratios: bool
    factor: float

    @staticmethod
    @functools.cache
    def of(scheme: Scheme, target: str) -> Packing:
        """Return the packing of a scheme for a target.

        Raises:
            FormatError: no kernel decodes the scheme for the target (`unsupported_reason`).
        """
        reason = unsupported_reason(scheme, target)
        if reason:
            raise FormatError(reason)
        group = decode_groups.decode_group(scheme.format, target)
        in_block = scales_in_block(scheme.group_size)
        zero_bytes = 2 if scheme.has_zero_point else 0
        if scheme.has_table:
            scale_bytes = 2 * scheme.groups(BLOCK_IC)
        elif scheme.group_size is None:
            scale_bytes = 4 + 2 * zero_bytes  # float32, then a pair of equal 16-bit floats
        else:
            scale_bytes = SCALE_DTYPES[scheme.scale_dtype].itemsize + zero_bytes
        by_ratios = target == decode_groups.INT8 and ratios.applies(scheme)
        factor = 1.0 if by_ratios else math.ldexp(1.0, group.exponent)
        return Packing(scheme, target, group, in_block, scale_bytes, in_block * scale_bytes, by_ratios, factor)

    @property
    def sums_in_block(self) -> int:
        """Sums of a block that are scaled apart, of one row: as many as it has scales, none where those make ratios."""
        return 0 if self.by_ratios else self.scales_in_block

    @property
    def scales_sums(self) -> bool:
        """Whether a row has one scale, by which its sums are multiplied: not scales in groups, nor a table."""
        return self.scheme.group_size is None and not self.scheme.has_table

    @staticmethod
    def beside(activations: Activations, dtype: torch.dtype, scheme: Scheme) -> Packing:
        """Return the packing of a scheme for activations that come in `dtype`.

        Raises:
            FormatError: no kernel takes that dtype, or decodes the scheme for it.
        """
        target = target_of(activations, dtype)
        if target is None:
            raise FormatError(f"kernels take float16 and bfloat16 activations, not {dtype}")
        return Packing.of(scheme, target)

    @property
    def layout(self) -> str:
        """The name of the layout: `tiles_float16` and the like."""
        return f"tiles_{self.target}"

    @property
    def registers(self) -> int:
        """Registers a lane has of a block: 32 with two weights each, or 16 with four."""
        return 64 // decode_groups.weights_in_register(self.target)

    def words(self, shape: tuple[int, int]) -> int:
        """Return the int32 words that the codes of a weight (OC, IC) take."""
        return oc_blocks(shape[0]) * ic_blocks(shape[1]) * 64 * self.scheme.format.bits

    def macros(self) -> dict[str, int | bool | str]:
        """Return the parameters of decode.cuh and scales.cuh; one scale a row is float32, whatever it was stored in."""
        group, in_groups = self.group, self.scales_in_block
        return {
            "BITS": self.scheme.format.bits,
            "DECODE_WORDS": group.words,
            "DECODE_REGISTERS": group.registers * group.spread,
            "DECODE_SPREAD": group.spread,
            "DECODE_MASK": f"{group.mask}u",
            "DECODE_SHIFT": group.shift,
            "DECODE_RAISED": group.raised,
            "DECODE_TERMS": ", ".join(str(number) for row in group.terms for number in row),
            "DECODE_FINISH": int(group.finish),
            "DECODE_CONSTANT": f"{group.constant}u",
            "SCALE_GROUPS": in_groups,
            "SCALE_TYPE": SCALE_TYPES[self.scheme.scale_dtype] if in_groups else 0,
            "ZERO_POINTS": self.scheme.has_zero_point,
            "RATIOS": self.by_ratios,
        }


NATIVE = {decode_groups.TARGETS[name]: name for name in decode_groups.PAIR_TARGETS}
"""Dtype of activations as they come -> the target for it."""


BYTEWISE = {
    Activations.E4M3: decode_groups.FP8,
    Activations.INT8: decode_groups.INT8,
    Activations.INT8_GROUPS: decode_groups.INT8_GROUPS,
}
"""Way with activations quantised to bytes -> the target for it."""


def target_of(activations: Activations, dtype: torch.dtype) -> str | None:
    """Return the decode target for activations that come in `dtype`; `None` where no kernel takes that dtype."""
    native = NATIVE.get(dtype)
    return native if native is None else BYTEWISE.get(activations, native)


def activations_of(layout: str) -> Activations:
    """Return what weights in a layout are multiplied with; the stored stream meets activations as they come."""
    target = LAYOUTS.get(layout)
    return next((way for way, bytewise in BYTEWISE.items() if bytewise == target), Activations.NATIVE)


def unsupported_reason(scheme: Scheme, target: str) -> str:
    """Return why no kernel decodes a scheme for a target, on whatever GPU, or an empty string when one does."""
    reason = decode_groups.unsupported_reason(scheme.format, target)
    if not reason and scheme.has_table and scheme.scale_dtype != target:
        return f"tables of {scheme.scale_dtype} meet {scheme.scale_dtype} activations, not {target}"
    step = 8 * decode_groups.weights_in_register(target)  # input channels that one instruction of the tensor cores adds
    if not reason and scheme.group_size is not None and scheme.group_size % step:
        return f"group size {scheme.group_size} is not a multiple of {step}"
    return reason


def scales_in_block(group_size: int | None) -> int:
    """Return how many scales of one row a block carries; 0 for one scale a row.

    A scale group that is no divisor or multiple of 128 is cut into pieces that are: each piece carries the scale again.

    Raises:
        ValueError: the group size is not a multiple of 16, which the kernels' k16 steps need.
    """
    if group_size is None:
        return 0
    piece = min(group_size & -group_size, BLOCK_IC)  # the largest power of two that divides both
    if piece % 16:
        raise ValueError(f"group size {group_size} is not a multiple of 16")
    return BLOCK_IC // piece
