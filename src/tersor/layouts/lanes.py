"""How do a lane's packed words become pairs of 16-bit floats? The tables behind kernels/cuda/decode.cuh.

A code's bits are put where a 16-bit float (or, for integers, its mantissa) wants them, by rotating a packed word,
XOR-ing at most one other rotated word, and masking: about one instruction a weight. Copying sign, exponent and
mantissa bits under the wider float's mantissa is exact, subnormals included, up to one power of two, which the
kernel's epilogue applies (FP6-LLM, arXiv 2401.14112, section 5.3, multiplies each weight instead).

Because rotations overlap, the packed bits are not a permutation of the code bits but a linear map over GF(2). The
tables below were found by random search for few instructions; `packing` inverts them once.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass

import torch

from tersor.formats import ElementFormat

TARGETS: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Decode target -> dtype of the activations it is multiplied with."""

_MANTISSA = {"float16": 10, "bfloat16": 7}
_BIAS = {"float16": 15, "bfloat16": 127}
_INT_MAGIC = {"float16": 1024, "bfloat16": 128}
_WORD = 0xFFFFFFFF


class Finish(enum.IntEnum):
    """What turns masked bits into numbers; the same names and values as in decode.cuh."""

    AS_IS = 0
    MULTIPLY = 1
    SUBTRACT = 2
    INT8_TO_BF16 = 3
    SHIFT_MULTIPLY = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One decode group: `words` packed words give `pairs` registers of two weights each.

    Attributes:
        words, pairs: registers in and out.
        mask: where a code's bits stand in a pair (the same 16 bits twice).
        shift: 0, or the left shift that yields the second register of each row of `terms`.
        terms: (word, rotation, word, rotation) a row; the third is -1 for a single term, `words` means the XOR of all.
        finish: how bits become numbers.
        constant: the pair of 16-bit constants `finish` uses.
        exponent: decoded value = pair value * 2^exponent.
    """

    words: int
    pairs: int
    mask: int
    shift: int
    terms: tuple[tuple[int, int, int, int], ...]
    finish: Finish
    constant: int
    exponent: int

    def outputs(self) -> list[list[tuple[int, int]]]:
        """Return, for each pair register, the (word, left rotation) whose XOR it is, under the mask."""
        rows = []
        for first, turn, second, second_turn in self.terms:
            row = [*self._expand(first, turn), *(self._expand(second, second_turn) if second >= 0 else [])]
            rows.append(row)
            if self.shift:
                rows.append([(word, (by + self.shift) % 32) for word, by in row])
        return rows

    def _expand(self, word: int, turn: int) -> list[tuple[int, int]]:
        return [(index, turn) for index in range(self.words)] if word == self.words else [(word, turn)]


def supported(fmt: ElementFormat, target: str) -> str:
    """Return why `fmt` cannot be decoded to `target`, or an empty string when it can."""
    if fmt.kind == "uint":
        return "zero points are served by the reference"
    if fmt.kind == "float" and fmt.exponent_bits >= (5 if target == "float16" else 8):
        return f"{fmt.name} reaches exponents that {target} keeps for infinity"
    if _key(fmt, _table_target(fmt, target)) not in _TABLES:
        return f"no decode table for {fmt.name}"
    return ""


@functools.cache
def lane(fmt: ElementFormat, target: str) -> Lane:
    """Return the decode group of `fmt` for activations of dtype `target`; `supported` must say yes."""
    table_target = _table_target(fmt, target)
    bits, code_mask = _key(fmt, table_target)
    words, shift, terms = _TABLES[bits, code_mask]
    exponent = 0
    constant = 0
    finish = Finish.AS_IS
    if fmt.kind == "int":
        finish = Finish.SUBTRACT
        constant = _pair(-float(_INT_MAGIC[target] + fmt.bias), target)
        if bits == 8 and target == "bfloat16":
            finish, constant = Finish.INT8_TO_BF16, 0
    else:
        exponent = _BIAS[target] - fmt.bias
        if target == "bfloat16":
            finish = Finish.MULTIPLY if table_target == target else Finish.SHIFT_MULTIPLY
            constant, exponent = _pair(2.0**exponent, target), 0
    return Lane(
        words=words,
        pairs=16 * words // bits,
        mask=code_mask | code_mask << 16,
        shift=shift,
        terms=terms,
        finish=finish,
        constant=constant,
        exponent=exponent,
    )


def place(codes: torch.Tensor, fmt: ElementFormat, target: str) -> torch.Tensor:
    """Return codes (int32) as the 16 bits of a pair's half."""
    if fmt.kind != "float":
        return codes
    low = _MANTISSA[_table_target(fmt, target)] - fmt.mantissa_bits
    magnitude = (1 << (fmt.bits - 1)) - 1
    return ((codes >> (fmt.bits - 1)) << 15) | ((codes & magnitude) << low)


def unplace(halves: torch.Tensor, fmt: ElementFormat, target: str) -> torch.Tensor:
    """Undo `place`."""
    if fmt.kind != "float":
        return halves
    low = _MANTISSA[_table_target(fmt, target)] - fmt.mantissa_bits
    magnitude = (1 << (fmt.bits - 1)) - 1
    return ((halves >> 15) << (fmt.bits - 1)) | ((halves >> low) & magnitude)


@functools.cache
def packing(group: Lane) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """Invert the decode: for each packed word, the (pair register, left rotation, mask) whose XOR it is."""
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


def _table_target(fmt: ElementFormat, target: str) -> str:
    """Five- and seven-bit floats have no bf16 table: they are put where fp16 wants them and shifted afterwards."""
    return "float16" if fmt.kind == "float" and fmt.bits in (5, 7) else target


def _key(fmt: ElementFormat, target: str) -> tuple[int, int]:
    if fmt.kind != "float":
        return fmt.bits, (1 << fmt.bits) - 1
    low = _MANTISSA[target] - fmt.mantissa_bits
    return fmt.bits, 0x8000 | ((1 << (fmt.bits - 1)) - 1) << low


def _rows(text: str) -> tuple[tuple[int, int, int, int], ...]:
    """Read rows such as `A2 B0^C6 X8`: a word's letter (X: the XOR of all) and its left rotation."""
    rows = []
    words = len({character for character in text if character.isalpha()} - {"X"})
    for entry in text.split():
        flat = []
        for term in entry.split("^"):
            flat += [words if term[0] == "X" else ord(term[0]) - ord("A"), int(term[1:])]
        rows.append((flat[0], flat[1], flat[2] if len(flat) > 2 else -1, flat[3] if len(flat) > 2 else 0))
    return tuple(rows)


# (bits, mask of a code in 16 bits) -> words in a group, shift, rows
_TABLES: dict[tuple[int, int], tuple[int, int, tuple[tuple[int, int, int, int], ...]]] = {
    key: (words, shift, _rows(rows))
    for key, (words, shift, rows) in {
        (6, 0x9F00): (3, 8, "A2 B4 C6 X0"),
        (6, 0x83E0): (3, 5, "A4 B8 C12 X0"),
        (6, 0x8F80): (3, 0, "C0^B2 B7^B12 X3^X8 C12^X8 X0^B2 A8^C12 A5^B7 A10"),
        (6, 0x81F0): (3, 0, "A14 A0^X5 A0^B10 X0^C5 B12^C11 B0^A8 A8^X9 X0^B4"),
        (5, 0x8F00): (5, 8, "D1^E4 B0^C0 A3 B0^D1 A0^E4 E0^D3 D0^B3 C5^D3"),
        (5, 0x9E00): (5, 8, "B0^C4 B0^B3 E0^D4 C0 D0^C4 A0^B2 E6^E7 A4^E6"),
        (4, 0x8E00): (2, 8, "A0 B21 A13^A18 B0^B1"),
        (4, 0x81C0): (2, 6, "B0 A0 A28^B24 B12^A24"),
        (4, 0x9C00): (2, 8, "B29 A6 B0^A31 A0^B27"),
        (4, 0x8380): (2, 4, "A25 B1 B24^A14 A0^B0"),
        (4, 0x8700): (2, 8, "B20 A0 A12 B0"),
        (4, 0x80E0): (2, 4, "A25 B17 A0^A18 B0^B9"),
        (4, 0x000F): (2, 0, "A0 A28 A24 A20 B0 B28 B24 B20"),
        (8, 0xBF80): (4, 0, "A20 A0^A27 B20 B0^B27 C20 C0^C27 D20 D0^D27"),
        (8, 0x87F0): (4, 0, "A0 A12^A24 B0 B12^B24 C0 C12^C24 D0 D12^D24"),
        (8, 0x00FF): (4, 0, "A0 A24 B0 B24 C0 C24 D0 D24"),
        (3, 0x8C00): (3, 8, "B1 A0 X21 X19 A2 C3 X0^C9 B12^B22"),
        (3, 0x8180): (3, 4, "B5 A19 X0 C18^C29 A0^C29 B0^A21 C0^X10 C19^B27"),
    }.items()
}
