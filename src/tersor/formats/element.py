"""What does this bit pattern mean? Element formats of 1 to 8 bits, with exact encode and decode.

Kinds, all named by their bits:

- `fp{bits}_e{E}m{M}`: one sign, E exponent and M mantissa bits, from the top bit down; bias 2^(E-1)-1, subnormals
  kept, the top exponent an ordinary number: no infinity, no NaN (FP6-LLM, arXiv 2401.14112, section 2; the 4- and
  6-bit types are those of the OCP Microscaling specification v1.0, section 5.3). `fp8_e4m3` here has no NaN either,
  so its maximum is 480; codes 0x7f and 0xff, which other libraries read as NaN, are +-480.
- `int{bits}`: symmetric integers stored as offset binary, code = value + 2^(bits-1).
- `uint{bits}`: unsigned integers that stand for value - zero point.
- `lut3`: a code says which of the eight numbers of its row's table the weight is (SqueezeLLM, arXiv 2306.07629). Alone
  it means nothing: it has neither values nor a way to round.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

from tersor.errors import FormatError, did_you_mean

_NAMED = (
    "fp8_e4m3",
    "fp8_e5m2",
    "fp7_e3m3",
    "fp7_e2m4",
    "fp6_e3m2",
    "fp6_e2m3",
    "fp5_e2m2",
    "fp5_e3m1",
    "fp4_e2m1",
    "fp4_e3m0",
    "fp4_e1m2",
    "fp3_e2m0",
    *(f"int{bits}" for bits in range(8, 1, -1)),
    *(f"uint{bits}" for bits in range(8, 0, -1)),
)
LUTS = ("lut3",)
"""The formats whose codes say a place in their row's table."""
_ALIASES = {"fp6": "fp6_e2m3", "fp5": "fp5_e2m2", "fp4": "fp4_e2m1", "fp3": "fp3_e2m0", "fp8": "fp8_e4m3"}
_NO_VALUES = "codes of {} have no values without the table of their row"
_FLOAT_NAME = re.compile(r"fp(\d+)_e(\d+)m(\d+)")
_INT_NAME = re.compile(r"(u?)int(\d+)")

_FLOAT32_MANTISSA = 23
_FLOAT32_BIAS = 127


@dataclass(frozen=True, slots=True)
class ElementFormat:
    """The meaning of the codes of one element format.

    Attributes:
        name: canonical name, such as `fp6_e3m2`.
        kind: `float`, `int` (symmetric), `uint` (with a zero point) or `lut` (a place in a table).
        bits: width of a code, 1 to 8.
        exponent_bits, mantissa_bits: of a float format; both 0 for integers.
    """

    name: str
    kind: str
    bits: int
    exponent_bits: int = 0
    mantissa_bits: int = 0

    @property
    def bias(self) -> int:
        """Exponent bias of a float format, 2^(E-1) - 1; the offset 2^(bits-1) of a symmetric integer's code."""
        if self.kind == "float":
            return (1 << (self.exponent_bits - 1)) - 1
        return 1 << (self.bits - 1) if self.kind == "int" else 0

    @property
    def max(self) -> float:
        """The largest magnitude that scaling aims at: the greatest value a code has.

        Raises:
            FormatError: codes have no values, or floats no exponents.
        """
        if self.kind == "lut":
            raise FormatError(_NO_VALUES.format(self.name))
        if self.kind == "float":
            top = (1 << self.exponent_bits) - 1
            if top == 0:
                raise FormatError(f"{self.name} has no exponent bits")
            return 2.0 ** (top - self.bias) * (2 - 2.0**-self.mantissa_bits)
        return float((1 << (self.bits - 1)) - 1 if self.kind == "int" else (1 << self.bits) - 1)

    @property
    def min_normal(self) -> float:
        """The smallest normal magnitude of a float format; 1 for integers."""
        return 2.0 ** (1 - self.bias) if self.kind == "float" else 1.0

    @property
    def smallest(self) -> float:
        """The smallest non-zero magnitude: a subnormal where there are mantissa bits; 1 for integers."""
        if self.kind != "float":
            return 1.0
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def zero_code(self) -> int:
        """The code that decodes to (positive) zero; of a table's, which may have no zero, the first."""
        return self.bias if self.kind == "int" else 0

    def values(self) -> torch.Tensor:
        """Return what every code means: float32 [2^bits], indexed by code (a uint's value is its code).

        Raises:
            FormatError: codes have no values.
        """
        return _values(self).clone()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Round already scaled values to codes: to nearest, ties to even, saturating at the format's ends.

        Args:
            x: any shape, a float dtype; converted to float32 first. NaN is not allowed (`compress` checks).

        Returns:
            uint8 codes of x's shape. -0.0 and what rounds to it keep their sign in float formats.

        Raises:
            FormatError: codes have no values.
        """
        if self.kind == "float":
            return self._round_float(x.to(torch.float32, copy=True))[0]
        low, offset = (-float(self.bias), self.bias) if self.kind == "int" else (0.0, 0)
        rounded = torch.round(x.to(torch.float32)).clamp_(low, self.max)
        return rounded.add_(offset).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the float32 values of uint8 `codes`, same shape and device.

        Raises:
            FormatError: codes have no values.
        """
        table = _values_on(self, codes.device)
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)

    def round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(encode(x), decode(encode(x)))` in one pass; `x` is float32 and is overwritten."""
        if self.kind == "float":
            return self._round_float(x)
        low, offset = (-float(self.bias), self.bias) if self.kind == "int" else (0.0, 0)
        rounded = x.round_().clamp_(low, self.max)
        return (rounded + offset).to(torch.uint8), rounded

    def _round_float(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Adding a power of two that is 2^23 quanta large makes the float32 adder itself round |x| to a whole number
        # of quanta, ties to even; the low bits of the sum then count those quanta. Subnormals share the quantum of
        # the lowest binade, so they need no case of their own.
        sign = (x.view(torch.int32) >> 31).bitwise_and_(1 << (self.bits - 1))
        magnitude = x.abs_().clamp_max_(self.max)
        if self.mantissa_bits == 0:
            code, rounded = self._round_to_power(magnitude)
            signed = rounded.view(torch.int32).bitwise_or_(sign << (32 - self.bits)).view(torch.float32)
            return code.bitwise_or_(sign).to(torch.uint8), signed
        lowest = _FLOAT32_BIAS + 1 - self.bias
        anchor = magnitude.view(torch.int32) >> _FLOAT32_MANTISSA
        anchor.clamp_min_(lowest)
        code = (anchor - lowest) << self.mantissa_bits
        anchor.add_(_FLOAT32_MANTISSA - self.mantissa_bits).bitwise_left_shift_(_FLOAT32_MANTISSA)
        total = magnitude.add_(anchor.view(torch.float32))
        code.add_(total.view(torch.int32)).sub_(anchor)
        rounded = total.sub_(anchor.view(torch.float32))
        signed = rounded.view(torch.int32).bitwise_or_(sign << (32 - self.bits)).view(torch.float32)
        return code.bitwise_or_(sign).to(torch.uint8), signed

    def _round_to_power(self, magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Without a mantissa a number of quanta has no parity worth the name: ties go to the even code.
        offset = _FLOAT32_BIAS - self.bias
        bits = magnitude.view(torch.int32)
        odd = ((bits >> _FLOAT32_MANTISSA) + offset) & 1
        nearest = ((bits + odd + 0x3FFFFF) >> _FLOAT32_MANTISSA) - offset
        code = torch.where(magnitude > self.min_normal / 2, nearest.clamp_min_(1), 0)
        return code, torch.where(code > 0, (code + offset) << _FLOAT32_MANTISSA, 0).view(torch.float32)


@functools.cache
def _values(fmt: ElementFormat) -> torch.Tensor:
    if fmt.kind == "lut":
        raise FormatError(_NO_VALUES.format(fmt.name))
    codes = torch.arange(1 << fmt.bits, dtype=torch.float64)
    if fmt.kind != "float":
        return (codes - fmt.bias).to(torch.float32)
    integers = torch.arange(1 << fmt.bits)
    mantissa = (integers & ((1 << fmt.mantissa_bits) - 1)).to(torch.float64)
    exponent = (integers >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    subnormal = exponent == 0
    fraction = mantissa * 2.0**-fmt.mantissa_bits + torch.where(subnormal, 0.0, 1.0)
    magnitude = torch.ldexp(fraction, exponent.clamp_min(1) - fmt.bias)
    negative = (integers >> (fmt.bits - 1)).bool()
    return torch.where(negative, -magnitude, magnitude).to(torch.float32)


@functools.cache
def _values_on(fmt: ElementFormat, device: torch.device) -> torch.Tensor:
    # Kept: a CUDA graph cannot capture a copy from the host.
    return _values(fmt).to(device)


def names() -> tuple[str, ...]:
    """Return the names of the formats in common use whose codes have values, widest first.

    `get` takes any other `fp{b}_e{E}m{M}` too, and `LUTS`.
    """
    return _NAMED


@functools.cache
def get(name: str) -> ElementFormat:
    """Return the element format called `name` (`fp6` stands for `fp6_e2m3`, `fp5` for `fp5_e2m2`).

    Raises:
        FormatError: no such format; the message names the nearest one and what exists.
    """
    name = _ALIASES.get(name, name)
    match = _FLOAT_NAME.fullmatch(name)
    if match:
        bits, exponent, mantissa = (int(part) for part in match.groups())
        if bits <= 8 and exponent >= 1 and 1 + exponent + mantissa == bits:
            return ElementFormat(name, "float", bits, exponent, mantissa)
    match = _INT_NAME.fullmatch(name)
    if match:
        bits = int(match.group(2))
        if (1 if match.group(1) else 2) <= bits <= 8:
            return ElementFormat(name, match.group(1) + "int", bits)
    if name in LUTS:
        return ElementFormat(name, "lut", int(name[-1]))
    known = (*_NAMED, *LUTS)
    near = did_you_mean(name, (*_ALIASES, *known))
    raise FormatError(f"unknown format {name!r}{near} (formats: {', '.join(known)})")
