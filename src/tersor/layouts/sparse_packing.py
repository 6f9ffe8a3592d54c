"""What do the values of a pruned weight mean for the kernel that expands them? Worked out once, as a value.

A value takes 16 bits, a float of the activations' dtype as it is, or a byte. What bytes stand for the codes of a format
is chosen so that little is left to do for the kernel once a byte permutation has put them where the bitmap has ones:

- one half of a 16-bit float, whose other half is zero or, of integers, the upper half of the power of two that lies
  above them (`SUBTRACT` in decode.cuh);
- of floats beside float16 activations, an e4m3 that has the value or half of it, which the GPU converts. It has neither
  480 nor halves of the smallest numbers; a weight that needs both has the following instead;
- where a float's bits lie across both halves, `pair ^ (pair >> turn)` under the mask of these bits gives them: a byte
  is found for every code by trying all of them.

A pruned weight has the bytes of zero instead. Beside activations in e4m3 a byte is an e4m3 itself, which the tensor
cores take as it is: of integers, too, up to a magnitude of 16.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from tersor.errors import FormatError
from tersor.formats import Scheme
from tersor.layouts import decode_groups
from tersor.layouts.decode_groups import FP8, DecodeGroup, Finish

_PLAIN = ("float16", "bfloat16")
_MAGIC_HIGH = {"float16": 0x64, "bfloat16": 0x43}
_SMALL_INT_BITS = 4
"""Integers of so many bits have a float16 whose lower half is zero."""
_BYTES = 256
_TURNS = range(8)
_E4M3_BIAS = 7


@dataclass(frozen=True, slots=True)
class SparsePacking:
    """Values of a pruned weight in kernel tiles for one dtype of activations; `SparsePacking.of` makes it.

    Attributes:
        target: dtype of the activations, `float16`, `bfloat16` or `float8_e4m3fn`.
        bits: what a value takes, 8 or 16.
        bytes_of: of every code, the byte that stands for it, -1 where none does; empty for 16 bits.
        converts: whether bytes are e4m3, which are converted beside 16-bit activations.
        high: whether a byte is the upper half of a 16-bit float.
        others: what a pruned weight has instead of a byte, and above it what the other half of the float is.
        turn: how far a pair is shifted before it is combined with itself, or 0.
        mask: where a float's bits stand in a pair.
        finish, constant: how bits become numbers (`decode_groups.DecodeGroup`).
        factor: what sums of expanded weights are multiplied by, beside the scales.
    """

    target: str
    bits: int
    bytes_of: tuple[int, ...]
    converts: bool
    high: bool
    others: int
    turn: int
    mask: int
    finish: Finish
    constant: int
    factor: float

    @staticmethod
    @functools.cache
    def choices(values: Scheme | str, target: str) -> tuple[SparsePacking, ...]:
        """Return the packings that some codes of a scheme may have, the one that is expanded soonest first.

        Raises:
            FormatError: no kernel expands them (`unsupported_reason`).
        """
        last = SparsePacking.of(values, target)
        if target == FP8 and isinstance(values, Scheme):
            return _converted(values, target)
        if isinstance(values, str) or values.format.kind != "float" or not last.turn or target != "float16":
            return (last,)
        return (*_converted(values, target), last)

    @staticmethod
    def holding(values: Scheme | str, target: str, codes: torch.Tensor) -> SparsePacking:
        """Return the packing that is expanded soonest among those that have a byte for all of some codes, uint8.

        Raises:
            FormatError: no kernel expands them (`unsupported_reason`), or all of these codes.
        """
        *others, last = SparsePacking.choices(values, target)
        if not others:
            return last
        there = torch.bincount(codes.reshape(-1).int(), minlength=_BYTES).bool().cpu()
        return SparsePacking.with_bytes_for(values, target, there)

    @staticmethod
    def with_bytes_for(values: Scheme | str, target: str, there: torch.Tensor) -> SparsePacking:
        """Return the same where bool [256] on the CPU says which codes there are."""
        choices = SparsePacking.choices(values, target)
        for packing in choices if target == FP8 else choices[:-1]:
            if not bool((torch.tensor(packing.bytes_of) < 0)[there[: len(packing.bytes_of)]].any()):
                return packing
        if target == FP8:
            raise FormatError(
                "a pruned weight has the largest number of its format and odd ones of the smallest, of which e4m3 has "
                "no common multiple: leave activations in 16 bits"
            )
        return choices[-1]

    @staticmethod
    @functools.cache
    def of(values: Scheme | str, target: str) -> SparsePacking:
        """Return the packing of any codes of a scheme, or of plain numbers, for activations of dtype `target`.

        Raises:
            FormatError: no kernel expands them (`unsupported_reason`).
        """
        reason = unsupported_reason(values, target)
        if reason:
            raise FormatError(reason)
        if isinstance(values, str):
            return SparsePacking(target, 16, (), False, True, 0, 0, 0xFFFFFFFF, Finish.AS_IS, 0, 1.0)
        if target == FP8:
            return _converted(values, target)[0]
        fmt = values.format
        group = decode_groups.decode_group(fmt, target)
        if fmt.kind == "int":
            if target == "float16" and fmt.bits <= _SMALL_INT_BITS:
                numbers = fmt.values().to(torch.float16).view(torch.int16).tolist()
                found = tuple((number & 0xFFFF) >> 8 for number in numbers)
                return SparsePacking(target, 8, found, False, True, 0, 0, 0xFF00FF00, Finish.AS_IS, 0, 1.0)
            magic = _MAGIC_HIGH[target] if group.finish is Finish.SUBTRACT else 0
            others = magic << 8 | fmt.zero_code
            codes = tuple(range(1 << fmt.bits))
            return _packing(target, group, codes, high=False, others=others, turn=0)
        codes_in_place = decode_groups.place(torch.arange(1 << fmt.bits, dtype=torch.int32), fmt, target)
        turn, found = _bytes_of(tuple((codes_in_place & 0xFFFF).tolist()), group.mask & 0xFFFF)
        if turn == 0 and group.finish is Finish.AS_IS:  # one kernel for all of these
            return SparsePacking(
                target, 8, found, False, True, 0, 0, 0xFF00FF00, group.finish, 0, math.ldexp(1.0, group.exponent)
            )
        return _packing(target, group, found, high=True, others=0, turn=turn)

    @property
    def bytewise(self) -> bool:
        """Whether activations are bytes."""
        return self.target == FP8

    @property
    def instructions(self) -> int:
        """Instructions of a warp for 1,024 weights, products and waits included: counted (docs/log/16-sparse.md)."""
        if self.bits == 16:
            return 137
        if self.bytewise:
            return 86
        return 104 + (16 if self.finish is not Finish.AS_IS else 0) + (32 if self.turn else 0)

    def macros(self) -> dict[str, int | bool | str]:
        """Return the parameters of sparse/expand.cuh, and of decode.cuh those of a code that stands for itself."""
        return {
            "VALUE_BITS": self.bits,
            "VALUE_CONVERTS": self.converts,
            "VALUE_HIGH": self.high,
            "VALUE_OTHERS": f"{self.others}u",
            "VALUE_TURN": self.turn,
            "DECODE_MASK": f"{self.mask}u",
            "DECODE_FINISH": int(self.finish),
            "DECODE_CONSTANT": f"{self.constant}u",
            "DECODE_WORDS": 1,
            "DECODE_REGISTERS": 1,
            "DECODE_SPREAD": 1,
            "DECODE_SHIFT": 0,
            "DECODE_RAISED": 0,
            "DECODE_TERMS": "0, 0, -1, 0, -1, 0",
        }

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Return values as they stand in queues: uint8 codes as bytes, 16-bit floats as int16."""
        if self.bits == 16:
            return values.view(torch.int16)
        bytes_of = torch.tensor([max(byte, 0) for byte in self.bytes_of], dtype=torch.uint8, device=values.device)
        return bytes_of[values.long()]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Undo `pack`; 16-bit floats have the activations' dtype."""
        if self.bits == 16:
            return packed.view(decode_groups.TARGETS[self.target])
        codes = torch.zeros(_BYTES, dtype=torch.uint8)
        for code, byte in enumerate(self.bytes_of):
            if byte >= 0:
                codes[byte] = code
        return codes.to(packed.device)[packed.long()]


def unsupported_reason(values: Scheme | str, target: str) -> str:
    """Return why no kernel expands codes of a scheme, or plain numbers of a dtype, or an empty string when one does."""
    if isinstance(values, str):
        if target not in _PLAIN:
            return f"plain values meet activations as they come, not {target}"
        return "" if values == target else f"values in {values} do not meet {target} activations"
    if target not in (*decode_groups.PAIR_TARGETS, FP8):
        return f"values of pruned weights are not expanded for {target} activations"
    if values.group_size is not None:
        return "pruned weights with scales in groups are not expanded"
    if values.format.kind == "uint":
        return "pruned weights with zero points are not expanded"
    if target == FP8:
        usual = torch.tensor(_converted(values, target)[0].bytes_of) >= 0
        few = int((~usual).sum()) <= 2 and values.format.kind == "float"  # the largest, of both signs
        return "" if few or bool(usual.all()) else f"{values.format.name} has numbers that e4m3 has not"
    return decode_groups.unsupported_reason(values.format, target)


@functools.cache
def _converted(scheme: Scheme, target: str) -> tuple[SparsePacking, ...]:
    """Return the packings in which bytes are e4m3: numbers as they are, up to a power of two, and half of them."""
    fmt = scheme.format
    power = fmt.bias - _E4M3_BIAS if fmt.kind == "float" else 0
    numbers = fmt.values().double() * 2.0**power
    found = []
    for half in (1.0, 0.5):
        stored = (numbers * half).float().to(torch.float8_e4m3fn)
        same = stored.double() == numbers * half
        bytes_of = tuple(torch.where(same, stored.view(torch.uint8).int(), -1).tolist())
        factor = math.ldexp(1.0, -power) / half
        found.append(SparsePacking(target, 8, bytes_of, True, True, 0, 0, 0xFFFFFFFF, Finish.AS_IS, 0, factor))
    return tuple(found)


def _packing(
    target: str, group: DecodeGroup, codes: tuple[int, ...], *, high: bool, others: int, turn: int
) -> SparsePacking:
    """Return a packing of bytes whose bits become numbers as those of a dense weight do."""
    factor = math.ldexp(1.0, group.exponent)
    return SparsePacking(target, 8, codes, False, high, others, turn, group.mask, group.finish, group.constant, factor)


def _bytes_of(fields: tuple[int, ...], mask: int) -> tuple[int, tuple[int, ...]]:
    """Return the least turn with which a byte stands for every field, and these bytes."""
    for turn in _TURNS:
        found: dict[int, int] = {}
        for byte in range(_BYTES):
            half = byte << 8
            found.setdefault((half ^ (half >> turn) if turn else half) & mask, byte)
        if all(field in found for field in fields):
            return turn, tuple(found[field] for field in fields)
    raise AssertionError(f"no byte gives every field under {mask:#x}")
