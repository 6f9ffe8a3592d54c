"""How do a lane's packed words become registers of floats? The tables behind kernels/cuda/decode.cuh.

A register holds two 16-bit floats or four 8-bit ones. A code's bits are put where that float (or, for integers, the
mantissa of a 16-bit float) wants them, by rotating a packed word, XOR-ing at most two other rotated words, and masking:
about one instruction a weight, half of one where four share a register. Copying sign, exponent and mantissa bits under
the wider float's mantissa is exact, subnormals included, up to one power of two, which the kernel's epilogue applies
(FP6-LLM, arXiv 2401.14112, section 5.3, multiplies each weight instead).

Because rotations overlap, the packed bits are not a permutation of the code bits but a linear map over GF(2). The
tables below were found by annealing for few instructions; `packing` inverts them once.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass

import torch

from tersor.errors import FormatError
from tersor.formats import ElementFormat

FP8 = "float8_e4m3fn"
"""The decode target for 8-bit activations."""
TARGETS: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    FP8: torch.float8_e4m3fn,
}
"""Decode target -> dtype of the activations it is multiplied with."""

PAIR_TARGETS = ("float16", "bfloat16")
"""Targets with two weights in a register."""

_OPERANDS = {"float16": ("float16",), "bfloat16": ("bfloat16",), FP8: ("e4m3", "e5m2")}
"""Decode target -> float types that decoded weights may have beside such activations, the preferred one first."""

_MANTISSA = {"float16": 10, "bfloat16": 7, "e4m3": 3, "e5m2": 2}
_BIAS = {"float16": 15, "bfloat16": 127, "e4m3": 7, "e5m2": 15}
_WIDTH = {"float16": 16, "bfloat16": 16, "e4m3": 8, "e5m2": 8}
_INT_MAGIC = {"float16": 1024, "bfloat16": 128}
_WORD = 0xFFFFFFFF


class Finish(enum.IntEnum):
    """What turns masked bits into numbers; the same names and values as in decode.cuh."""

    AS_IS = 0
    MULTIPLY = 1
    SUBTRACT = 2
    INT8_TO_BF16 = 3
    UINT8_TO_BF16 = 4
    HALVE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """One decode group: `words` packed words give `registers` registers of two or four weights each.

    Attributes:
        words, registers: in and out.
        mask: where a code's bits stand in a register (the same 16 or 8 bits in each place).
        shift: 0, or the left shift that yields the second register of each row of `terms`.
        raised: 0, or how many places above `mask` the kernels leave the bits of every second register, to divide the
            floats by 2^raised; `outputs` is without that.
        terms: three times (word, rotation) a row; a word is -1 where there is no such term, `words` means the XOR of
            all.
        finish: how bits become numbers.
        constant: the pair of 16-bit constants `finish` uses; with zero points each row has its own (`zero_constants`).
        exponent: decoded value = register's value * 2^exponent.
        operand: the float type of the registers: `float16`, `bfloat16`, `e4m3` or `e5m2`.
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
    if _width(target) == 8:
        if fmt.kind != "float":
            return f"{fmt.name} is no float type: {target} activations need one"
        if fmt.bits == 8:
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
    words, shift, terms = _TABLES[mask]
    exponent = 0
    constant = 0
    raised = 0
    finish = Finish.AS_IS
    if fmt.kind != "float":
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

    Raises:
        FormatError: a zero point whose constant `target` cannot hold exactly.
    """
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
    return (-constants.view(TARGETS[target]).to(torch.float32) - _zero_base(fmt, target)).to(torch.uint8)


def _zero_base(fmt: ElementFormat, target: str) -> int:
    """Return what a constant takes away beside the zero point: the magic number, or -128 for a code less 128."""
    return -128 if fmt.bits == 8 and target == "bfloat16" else _INT_MAGIC[target]


def weights_in_register(target: str) -> int:
    """Return how many weights a decoded register holds: two of 16 bits, or four of 8."""
    return 32 // _width(target)


def place(codes: torch.Tensor, fmt: ElementFormat, target: str) -> torch.Tensor:
    """Return codes (int32) as the 16 or 8 bits that each has in a register."""
    if fmt.kind != "float":
        return codes
    low, width = _field(fmt, target)
    magnitude = (1 << (fmt.bits - 1)) - 1
    return ((codes >> (fmt.bits - 1)) << (width - 1)) | ((codes & magnitude) << low)


def unplace(fields: torch.Tensor, fmt: ElementFormat, target: str) -> torch.Tensor:
    """Undo `place`."""
    if fmt.kind != "float":
        return fields
    low, width = _field(fmt, target)
    magnitude = (1 << (fmt.bits - 1)) - 1
    return ((fields >> (width - 1)) << (fmt.bits - 1)) | ((fields >> low) & magnitude)


def join(fields: torch.Tensor) -> torch.Tensor:
    """Return registers (int32) from the fields in the last dimension, two of 16 or four of 8 bits, lowest first."""
    width = 32 // fields.shape[-1]
    registers = fields[..., 0].clone()
    for index in range(1, fields.shape[-1]):
        registers |= fields[..., index] << (width * index)
    return registers


def split(registers: torch.Tensor, target: str) -> torch.Tensor:
    """Undo `join`: return the fields of registers in a new last dimension."""
    width = _width(target)
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


def _width(target: str) -> int:
    return _WIDTH[_OPERANDS[target][0]]


def _field(fmt: ElementFormat, target: str) -> tuple[int, int]:
    """Return (lowest bit, width) of a float's field in a register."""
    operand = _operand(fmt, target)
    if operand is None:
        raise ValueError(f"{fmt.name} is not decoded to {target}")
    return _MANTISSA[operand] - fmt.mantissa_bits, _WIDTH[operand]


@functools.cache
def _operand(fmt: ElementFormat, target: str) -> str | None:
    """Return the float type that `fmt` is decoded to beside activations of `target`: one that has a table."""
    return next((choice for choice in _OPERANDS[target] if _mask(fmt, choice) in _TABLES), None)


def _halved(fmt: ElementFormat, operand: str) -> bool:
    """Tell whether the top exponent of `fmt`, an ordinary number, stands where fp16 has infinity and NaN."""
    return operand == "float16" and fmt.exponent_bits == 5


def _mask(fmt: ElementFormat, operand: str) -> int:
    """Return where the bits of codes stand in a register; 0 where they do not fit."""
    width = _WIDTH[operand]
    field = (1 << fmt.bits) - 1
    if fmt.kind == "float":
        low = _MANTISSA[operand] - fmt.mantissa_bits
        if low < 0 or low + fmt.bits > width:
            return 0
        field = 1 << (width - 1) | (field >> 1) << low
    return field * (0x00010001 if width == 16 else 0x01010101)


def _words(mask: int, shift: int, text: str) -> int:
    """Return how many packed words a table's registers come from: they hold as many bits."""
    return len(text.split()) * (2 if shift else 1) * mask.bit_count() // 32


def _rows(text: str, words: int) -> tuple[tuple[int, ...], ...]:
    """Read rows such as `A2 B0^C6 X8`: a word's letter (X: the XOR of all) and its left rotation."""
    rows = []
    for entry in text.split():
        flat = []
        for term in entry.split("^"):
            flat += [words if term[0] == "X" else ord(term[0]) - ord("A"), int(term[1:])]
        rows.append((*flat, *((-1, 0) * (3 - len(flat) // 2))))
    return tuple(rows)


_TABLES: dict[int, tuple[int, int, tuple[tuple[int, ...], ...]]] = {
    mask: (_words(mask, shift, rows), shift, _rows(rows, _words(mask, shift, rows)))
    for mask, (shift, rows) in {
        0x87F087F0: (0, "A0 A12^A24 B0 B12^B24 C0 C12^C24 D0 D12^D24"),
        0x8FE08FE0: (0, "A13 A0^A5 B13 B0^B5 C13 C0^C5 D13 D0^D5"),
        0xBF80BF80: (0, "A20 A0^A27 B20 B0^B27 C20 C0^C27 D20 D0^D27"),
        0xFF00FF00: (0, "A0 A8 B0 B8 C0 C8 D0 D8"),
        0x81F881F8: (
            0,
            "F0^G22 D10^F9 B0^D18 B0^B26 A0^E0 C0^C26 C0^D10 B3^F6 C19^F6 C0^G0 A23^C19 E26 D5^F0 A29 A0^G27 D0^E19",
        ),
        0x83F083F0: (
            0,
            "B10^D23 A25^E14 A0 A5^D0 E0^E6 G20^G27 A5^F10 F0^F19 "
            "C24^D23 E0^G20 X0^X12 C0^X0 D28^E6 X0^X23 B22^F10 B0^D23",
        ),
        0x8FC08FC0: (
            0,
            "C7^E26 D0^E7 A10^G23 E0^G0 C10^D13 C0^D0 D13^G0 A23 B0^G0 G26 D0^F5 D0^D6 F0^F26 B21 B27^F24 A0^F26",
        ),
        0x9F809F80: (
            0,
            "E9 C0^D21 E0^G27 B0^B5 D0^F30 B0^F0 C20^E0 F7 G0^G6 X15 A3^G0 A10^X6 D21^D30 B10^D21 A10^G6 B10^C27",
        ),
        0x81F081F0: (0, "C0^X22 A28 C0^C20 A8^C0 B0^B26 C0^C27 X0 A28^B3"),
        0x83E083E0: (5, "A4 B8 C12 X0"),
        0x8F808F80: (0, "X6 A26^C0 A3^C21 A0^B12 A0^A26 B0^X11 B0^B25 A26^C21"),
        0x9F009F00: (8, "A2 B4 C6 X0"),
        0x81E081E0: (0, "X12 C8^E2 X17 C19^E2 E2^X22 C30^D25 A27 A22^E2 B0 D0^D25 E2^E23 B24^D25 D4 E12^E22 A0 B28"),
        0x83C083C0: (
            0,
            "A4^C24 B24^X21 D4 A8^B0 B24^C29 C2^E20 B0^C0 E0^X10 A29^E28 B28 C24^X10 A29^B0 C0^E23 X21 A0^D0 D0^D25",
        ),
        0x8F008F00: (8, "D1^E4 B0^C0 A3 B0^D1 A0^E4 E0^D3 D0^B3 C5^D3"),
        0x9E009E00: (8, "B0^C4 B0^B3 E0^D4 C0 D0^C4 A0^B2 E6^E7 A4^E6"),
        0x80E080E0: (4, "A25 B17 A0^A18 B0^B9"),
        0x81C081C0: (6, "B0 A0 A28^B24 B12^A24"),
        0x83808380: (4, "A25 B1 B24^A14 A0^B0"),
        0x87008700: (8, "B20 A0 A12 B0"),
        0x8E008E00: (8, "A0 B21 A13^A18 B0^B1"),
        0x9C009C00: (8, "B29 A6 B0^A31 A0^B27"),
        0x81808180: (4, "B5 A19 X0 C18^C29 A0^C29 B0^A21 C0^X10 C19^B27"),
        0x8C008C00: (8, "B1 A0 X21 X19 A2 C3 X0^C9 B12^B22"),
        0x00FF00FF: (0, "A0 A24 B0 B24 C0 C24 D0 D24"),
        0x007F007F: (
            0,
            "E12^F25 A25^E0 C14^E21 B0^C7 C0^F0 D0^D12 B0^G0 G7 C0^D0 B23 A23^G28 D5^F25 D5^G0 A0 B29^C0 E0^F20",
        ),
        0x003F003F: (0, "A14^B28 B22^C26 A21^B28 B22 A14^A25 C4 B0^C0 A0^B0"),
        0x001F001F: (
            0,
            "A3^A27 B5 C29 E0^E17 A0^D21 B0^D0 D26 A27^C0 C25^E17 A27^B26 E27 A22^D30 E22 C4^D0 B0^B12 A0^B0",
        ),
        0x000F000F: (0, "A0 A28 A24 A20 B0 B28 B24 B20"),
        0x00070007: (0, "A28^B3 B0^B3 A6^A19 B0^C0 A0^B12 A19 A0^B25 A9 B29^C29 C10 C7 A28^C29 A29^C21 A0^A28 B6 C2"),
        0x00030003: (0, "A0^A22 A26^A8 A22^A28 A0 A14^A22 A0^A18 A22^A26 A20^A22"),
        0x00010001: (0, "A0 A8 A17 A15 A9 A5 A26 A6 A14 A23 A3 A11 A13 A18 A28 A20"),
        0xBFBFBFBF: (0, "A27^G29 B0^E15 E0^D15 G0^B5 D0^F0 G0^C21 C21^F17 A7^B5^C0"),
        0x9F9F9F9F: (0, "A0^C0 B0^C6 C6 A4^B2"),
        0x9E9E9E9E: (0, "B0^C4 B0^B3 E0^D4 C0 D0^C4 A0^B2 E6^E7 A4^E6"),
        0x87878787: (0, "B0 A4 B20 A0"),
        0x9C9C9C9C: (0, "B5 A0 A2^B3 B0^A1"),
        0x8C8C8C8C: (0, "C0^B6 A0^B6 X0^X7 A0 X0^A2 B0^C5 B4^X1 C3^X1"),
    }.items()
}
"""Mask of a register's code bits -> words in a group, shift, rows."""
