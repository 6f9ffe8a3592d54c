"""How do a lane's packed words become registers of numbers? What kernels/cuda/decode.cuh does with decode_tables.py.

A register holds two 16-bit floats, four 8-bit ones or four int8. A code's bits are put where that float (or, for
integers, the mantissa of a 16-bit float) wants them, by rotating a packed word, XOR-ing at most two other rotated
words, and masking: about one instruction a weight, half of one where four share a register. Copying sign, exponent and
mantissa bits under the wider float's mantissa is exact, subnormals included, up to one power of two, which the kernel's
epilogue applies (FP6-LLM, arXiv 2401.14112, section 5.3, multiplies each weight instead). A symmetric integer beside
int8 stands in the top bits of its byte, in two's complement, and so is a number times a power of two; one with a zero
point stands in the lowest bits, and the zero point is taken from four of them at once. So are integers beside e4m3, of
which a magnitude of up to 16 becomes a number where it stands: the lowest bits of e4m3 count equal steps up to there.
Codes that say a place in a table of eight stand in four bits each, eight in a register, where a permutation of bytes
takes them for selectors: of such a register four with two 16-bit floats are made.

Because rotations overlap, the packed bits are not a permutation of the code bits but a linear map over GF(2). The
tables were found by annealing for few instructions; `packing` inverts them once.
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass

import torch

from tersor.errors import FormatError
from tersor.formats import ElementFormat
from tersor.layouts.decode_tables import TABLES

FP8 = "float8_e4m3fn"
"""The decode target for activations quantised to e4m3."""
INT8 = "int8"
"""The decode target for activations quantised to int8."""
INT8_GROUPS = "int8_g128"
"""The same for those with scales in groups: what weights become does not differ, what a kernel does with sums does."""
TARGETS: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    FP8: torch.float8_e4m3fn,
    INT8: torch.int8,
    INT8_GROUPS: torch.int8,
}
"""Decode target -> dtype of the activations it is multiplied with."""

PAIR_TARGETS = ("float16", "bfloat16")
"""Targets with two weights in a register."""

_OPERANDS = {
    "float16": ("float16",),
    "bfloat16": ("bfloat16",),
    FP8: ("e4m3", "e5m2"),
    INT8: ("int8",),
    INT8_GROUPS: ("int8",),
}
"""Decode target -> types that decoded weights may have beside such activations, the preferred one first."""

_MANTISSA = {"float16": 10, "bfloat16": 7, "e4m3": 3, "e5m2": 2}
_BIAS = {"float16": 15, "bfloat16": 127, "e4m3": 7, "e5m2": 15}
_WIDTH = {"float16": 16, "bfloat16": 16, "e4m3": 8, "e5m2": 8, "int8": 8}
_INT_MAGIC = {"float16": 1024, "bfloat16": 128}
_WORD = 0xFFFFFFFF
_MOST_SUBTRACTED = {INT8: 128, INT8_GROUPS: 128, FP8: 16}
"""Target -> the largest zero point that any code may be less: to stay in int8, or a number that e4m3 has."""
_SELECTORS = 0x77777777
_STEP_OF_E4M3 = 2.0**-9
_STEPS_OF_E4M3 = 16
"""Up to so many of its smallest steps e4m3 has every number, as the bits of their count."""


class Finish(enum.IntEnum):
    """What turns masked bits into numbers; the same names and values as in decode.cuh."""

    AS_IS = 0
    MULTIPLY = 1
    SUBTRACT = 2
    INT8_TO_BF16 = 3
    UINT8_TO_BF16 = 4
    HALVE = 5
    SUBTRACT_BYTES = 6
    SUBTRACT_TO_E4M3 = 7
    CHOOSE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """One decode group: `words` packed words give `registers` registers of two, four or, before a table, eight codes.

    Attributes:
        words, registers: in and out.
        mask: where a code's bits stand in a register (the same 16, 8 or 4 bits in each place).
        shift: 0, or the left shift that yields the second register of each row of `terms`.
        raised: 0, or how many places above `mask` the kernels leave the bits of every second register, to divide the
            floats by 2^raised; `outputs` is without that.
        terms: three times (word, rotation) a row; a word is -1 where there is no such term, `words` means the XOR of
            all.
        finish: how bits become numbers.
        constant: the pair of 16-bit constants `finish` uses; with zero points each row has its own (`zero_constants`).
        exponent: decoded value = register's value * 2^exponent.
        operand: the type of the registers' numbers: `float16`, `bfloat16`, `e4m3`, `e5m2` or `int8`.
    """

    words: int
    registers: int
    mask: int
    shift: int
    raised: int
    terms: tuple[tuple[int, ...], ...]
    finish: Finish
    constant: int
    exponent: int
    operand: str

    @property
    def spread(self) -> int:
        """Registers of numbers that one of codes becomes."""
        return 4 if self.finish is Finish.CHOOSE else 1

    def outputs(self) -> list[list[tuple[int, int]]]:
        """Return, for each register, the (word, left rotation) whose XOR it is, under the mask."""
        rows = []
        for term in self.terms:
            pairs = zip(term[::2], term[1::2], strict=True)
            row = [entry for word, turn in pairs if word >= 0 for entry in self._expand(word, turn)]
            rows.append(row)
            if self.shift:
                rows.append([(word, (by + self.shift) % 32) for word, by in row])
        return rows

    def _expand(self, word: int, turn: int) -> list[tuple[int, int]]:
        return [(index, turn) for index in range(self.words)] if word == self.words else [(word, turn)]


def unsupported_reason(fmt: ElementFormat, target: str) -> str:
    """Return why `fmt` cannot be decoded to `target`, or an empty string when it can."""
    if fmt.kind == "lut":
        return "" if target in PAIR_TARGETS else f"tables of {fmt.name} have 16-bit floats, which meet no bytes"
    if _whole(target):
        if fmt.kind == "float":
            return f"{fmt.name} is no integer type: int8 activations need one"
        if fmt.kind == "uint" and fmt.bits == 8:
            return f"{fmt.name} less its zero point does not fit int8"
    elif _width(target) == 8:
        if fmt.kind != "float" and _largest(fmt) > _STEPS_OF_E4M3:
            return (
                f"{fmt.name} has integers that e4m3 has not: {target} activations need a float type, int5 or fewer bits"
            )
        if fmt.kind == "float" and fmt.bits == 8:
            return f"{fmt.name} has numbers where the tensor cores' 8-bit floats have NaN or infinity"
    elif fmt.kind == "float" and fmt.exponent_bits > (5 if target == "float16" else 7):
        return f"{fmt.name} reaches exponents that {target} does not have"
    if _operand(fmt, target) is None:
        return f"no decode table for {fmt.name} in {target}"
    return ""


@functools.cache
def decode_group(fmt: ElementFormat, target: str) -> DecodeGroup:
    """Return the decode group of `fmt` for activations of dtype `target`; `unsupported_reason` must be empty."""
    operand = _operand(fmt, target)
    if operand is None:
        raise ValueError(f"{fmt.name} is not decoded to {target}")
    mask = _mask(fmt, operand)
    words, shift, terms = TABLES[mask]
    exponent = 0
    constant = 0
    raised = 0
    finish = Finish.AS_IS
    if fmt.kind == "lut":
        finish = Finish.CHOOSE
    elif _whole(target):
        if fmt.kind == "uint":
            finish = Finish.SUBTRACT_BYTES
        else:
            exponent = fmt.bits - 8
    elif target == FP8 and fmt.kind != "float":
        finish, exponent = Finish.SUBTRACT_TO_E4M3, -int(math.log2(_STEP_OF_E4M3))
        constant = fmt.bias * 0x01010101
    elif fmt.kind != "float":
        finish = Finish.SUBTRACT
        if fmt.bits == 4 and target == "float16":
            raised = fmt.bits  # its mantissa has room for two codes
        constant = _pair(-float(_INT_MAGIC[target] + fmt.bias), target)
        if fmt.bits == 8 and target == "bfloat16":
            finish, constant = Finish.UINT8_TO_BF16 if fmt.kind == "uint" else Finish.INT8_TO_BF16, 0
    elif target == "bfloat16":
        finish = Finish.MULTIPLY
        constant = _pair(2.0 ** (_BIAS[target] - fmt.bias), target)
    else:
        exponent = _BIAS[operand] - fmt.bias
        if _halved(fmt, operand):
            finish = Finish.HALVE
            exponent += 1
    return DecodeGroup(
        words=words,
        registers=32 * words // mask.bit_count(),
        mask=mask,
        shift=shift,
        raised=raised,
        terms=terms,
        finish=finish,
        constant=constant,
        exponent=exponent,
        operand=operand,
    )


def zero_constants(zero_point: torch.Tensor, fmt: ElementFormat, target: str) -> torch.Tensor:
    """Return what decoding adds for zero points: the bits (int16) of 16-bit floats of `target`, same shape.

    For int8 and e4m3 it takes them away, and the 16 bits are the zero point twice, a byte each.

    Raises:
        FormatError: a zero point whose constant `target` cannot hold exactly.
    """
    if target in _MOST_SUBTRACTED:
        if zero_point.numel() and int(zero_point.max()) > _MOST_SUBTRACTED[target]:
            operand = _operand(fmt, target)
            raise FormatError(f"a zero point of {int(zero_point.max())} in {fmt.name} is beyond what {operand} takes")
        return zero_point.to(torch.int16) * 0x0101
    wanted = -(zero_point.to(torch.float32) + _zero_base(fmt, target))
    constants = wanted.to(TARGETS[target])
    inexact = constants != wanted
    if bool(inexact.any()):
        value = int(zero_point[inexact][0])
        raise FormatError(
            f"a zero point of {value} in {fmt.name} is beyond what {target} activations take: use float16"
        )
    return constants.view(torch.int16)


def zero_points(constants: torch.Tensor, fmt: ElementFormat, target: str) -> torch.Tensor:
    """Undo `zero_constants`: return the zero points (uint8)."""
    if target in _MOST_SUBTRACTED:
        return (constants & 0xFF).to(torch.uint8)
    return (-constants.view(TARGETS[target]).to(torch.float32) - _zero_base(fmt, target)).to(torch.uint8)


def _zero_base(fmt: ElementFormat, target: str) -> int:
    """Return what a constant takes away beside the zero point: the magic number, or -128 for a code less 128."""
    return -128 if fmt.bits == 8 and target == "bfloat16" else _INT_MAGIC[target]


def weights_in_register(target: str) -> int:
    """Return how many weights a decoded register holds: two of 16 bits, or four of 8."""
    return 32 // _width(target)


def place(codes: torch.Tensor, fmt: ElementFormat, target: str) -> torch.Tensor:
    """Return codes (int32) as the 16 or 8 bits that each has in a register."""
    if _whole(target) and fmt.kind == "int":
        return (codes ^ fmt.bias) << (8 - fmt.bits)
    if fmt.kind != "float":
        return codes
    low, width = _field(fmt, target)
    magnitude = (1 << (fmt.bits - 1)) - 1
    return ((codes >> (fmt.bits - 1)) << (width - 1)) | ((codes & magnitude) << low)


def unplace(fields: torch.Tensor, fmt: ElementFormat, target: str) -> torch.Tensor:
    """Undo `place`."""
    if _whole(target) and fmt.kind == "int":
        return (fields >> (8 - fmt.bits)) ^ fmt.bias
    if fmt.kind != "float":
        return fields
    low, width = _field(fmt, target)
    magnitude = (1 << (fmt.bits - 1)) - 1
    return ((fields >> (width - 1)) << (fmt.bits - 1)) | ((fields >> low) & magnitude)


def join(fields: torch.Tensor) -> torch.Tensor:
    """Return registers (int32) from the fields in the last dimension, lowest first, which share the 32 bits evenly."""
    width = 32 // fields.shape[-1]
    registers = fields[..., 0].clone()
    for index in range(1, fields.shape[-1]):
        registers |= fields[..., index] << (width * index)
    return registers


def split(registers: torch.Tensor, fields: int) -> torch.Tensor:
    """Undo `join`: return so many fields of registers in a new last dimension."""
    width = 32 // fields
    return torch.stack([(registers >> low) & ((1 << width) - 1) for low in range(0, 32, width)], dim=-1)


@functools.cache
def packing(group: DecodeGroup) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """Invert the decode: for each packed word, the (register, left rotation, mask) whose XOR it is."""
    # Columns are packed bits, rows are wanted bits with, above them, the bit of the pair register they stand for.
    width = 32 * group.words
    rows = []
    for register, sources in enumerate(group.outputs()):
        for bit in range(32):
            if group.mask >> bit & 1:
                row = 0
                for word, turn in sources:
                    row ^= 1 << (32 * word + (bit - turn) % 32)
                rows.append(row | 1 << (width + 32 * register + bit))
    for column in range(width):
        pivot = next((i for i in range(column, len(rows)) if rows[i] >> column & 1), None)
        if pivot is None:
            raise AssertionError(f"the decode table for mask {group.mask:#x} is singular")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for i in range(len(rows)):
            if i != column and rows[i] >> column & 1:
                rows[i] ^= rows[column]
    words = []
    for word in range(group.words):
        masks: dict[tuple[int, int], int] = {}
        for bit in range(32):
            wanted = rows[32 * word + bit] >> width
            while wanted:
                position = (wanted & -wanted).bit_length() - 1
                wanted &= wanted - 1
                register, source_bit = divmod(position, 32)
                turn = (bit - source_bit) % 32
                masks[register, turn] = masks.get((register, turn), 0) | 1 << bit
        words.append(tuple((register, turn, mask) for (register, turn), mask in sorted(masks.items())))
    return tuple(words)


def rotate(word: torch.Tensor, left: int) -> torch.Tensor:
    """Rotate int32 words left."""
    if left == 0:
        return word
    return (word << left) | ((word >> (32 - left)) & ((1 << left) - 1))


def signed(mask: int) -> int:
    """Return a 32-bit pattern as the signed integer torch wants."""
    mask &= _WORD
    return mask - (1 << 32) if mask >> 31 else mask


def _pair(value: float, target: str) -> int:
    half = int(torch.tensor(value, dtype=TARGETS[target]).view(torch.int16)) & 0xFFFF
    return half | half << 16


def _whole(target: str) -> bool:
    """Tell whether activations of a target are int8."""
    return TARGETS[target] is torch.int8


def _width(target: str) -> int:
    return _WIDTH[_OPERANDS[target][0]]


def _largest(fmt: ElementFormat) -> int:
    """Return the largest magnitude that an integer has, less any zero point."""
    return (1 << fmt.bits) - 1 if fmt.kind == "uint" else fmt.bias


def _field(fmt: ElementFormat, target: str) -> tuple[int, int]:
    """Return (lowest bit, width) of a float's field in a register."""
    operand = _operand(fmt, target)
    if operand is None:
        raise ValueError(f"{fmt.name} is not decoded to {target}")
    return _MANTISSA[operand] - fmt.mantissa_bits, _WIDTH[operand]


@functools.cache
def _operand(fmt: ElementFormat, target: str) -> str | None:
    """Return the type that `fmt` is decoded to beside activations of `target`: one that has a table."""
    return next((choice for choice in _OPERANDS[target] if _mask(fmt, choice) in TABLES), None)


def _halved(fmt: ElementFormat, operand: str) -> bool:
    """Tell whether the top exponent of `fmt`, an ordinary number, stands where fp16 has infinity and NaN."""
    return operand == "float16" and fmt.exponent_bits == 5


def _mask(fmt: ElementFormat, operand: str) -> int:
    """Return where the bits of codes stand in a register; 0 where they do not fit."""
    if fmt.kind == "lut":
        return _SELECTORS
    width = _WIDTH[operand]
    field = (1 << fmt.bits) - 1
    if fmt.kind == "float":
        low = _MANTISSA[operand] - fmt.mantissa_bits
        if low < 0 or low + fmt.bits > width:
            return 0
        field = 1 << (width - 1) | (field >> 1) << low
    elif operand == "int8" and fmt.kind == "int":
        field <<= width - fmt.bits
    return field * (0x00010001 if width == 16 else 0x01010101)
