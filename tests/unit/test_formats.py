"""Element formats: every code of every format, rounding, scales."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from tersor import formats
from tersor.errors import FormatError

FLOATS = tuple(name for name in formats.names() if name.startswith("fp"))
INTS = tuple(name for name in formats.names() if name.startswith("int"))
EVERY_FLOAT = tuple(f"fp{1 + e + m}_e{e}m{m}" for e in range(1, 8) for m in range(8) if 1 + e + m <= 8)


def value_by_definition(fmt: formats.ElementFormat, code: int) -> float:
    """The meaning of a float code, spelled out."""
    sign = -1.0 if code >> (fmt.bits - 1) else 1.0
    exponent = (code >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    mantissa = code & ((1 << fmt.mantissa_bits) - 1)
    fraction = mantissa / (1 << fmt.mantissa_bits)
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - fmt.bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - fmt.bias)


@pytest.mark.parametrize("name", EVERY_FLOAT)
def test_every_float_code_means_what_the_definition_says(name: str) -> None:
    fmt = formats.get(name)
    values = fmt.values()
    assert values.shape == (1 << fmt.bits,)
    for code in range(1 << fmt.bits):
        expected = value_by_definition(fmt, code)
        assert float(values[code]) == expected
        assert math.copysign(1, float(values[code])) == math.copysign(1, expected)
    assert fmt.max == float(values.max())
    positive = values[values > 0]
    assert fmt.smallest == float(positive.min())


@pytest.mark.parametrize("name", (*EVERY_FLOAT, *INTS))
def test_encode_inverts_decode_for_every_code(name: str) -> None:
    fmt = formats.get(name)
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8)
    assert torch.equal(fmt.decode(codes), fmt.values())
    assert torch.equal(fmt.encode(fmt.values()), codes)


@pytest.mark.parametrize("name", EVERY_FLOAT)
def test_rounding_is_to_nearest_ties_to_even_saturating(name: str) -> None:
    """Between any two neighbours: just below the middle, the middle, just above; and beyond the end."""
    fmt = formats.get(name)
    magnitudes = fmt.values()[: 1 << (fmt.bits - 1)]
    for code in range(len(magnitudes) - 1):
        low, high = float(magnitudes[code]), float(magnitudes[code + 1])
        middle = torch.tensor((low + high) / 2)
        around = torch.stack((torch.nextafter(middle, torch.tensor(low)), middle, torch.nextafter(middle, middle * 2)))
        expected = [code, code + code % 2, code + 1]
        assert fmt.encode(around).tolist() == expected
        negative = fmt.encode(-around)
        assert negative.tolist() == [c | 1 << (fmt.bits - 1) for c in expected]
    top = len(magnitudes) - 1
    beyond = torch.tensor([fmt.max * 1.01, fmt.max * 1e6, 3e38, float("inf")])
    assert fmt.encode(beyond).tolist() == [top] * 4


@pytest.mark.parametrize("name", INTS)
def test_integers_are_offset_binary(name: str) -> None:
    fmt = formats.get(name)
    half = 1 << (fmt.bits - 1)
    assert fmt.values().tolist() == [float(v) for v in range(-half, half)]
    x = torch.tensor([0.0, 0.49, 0.5, 1.5, -0.5, -1.5, 1e9, -1e9])
    expected = [0, 0, 0, 2, 0, -2, half - 1, -half]
    expected = [max(-half, min(half - 1, v)) for v in expected]
    assert (fmt.encode(x).int() - half).tolist() == expected
    assert fmt.max == half - 1


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("fp6_e3m2", ml_dtypes.float6_e3m2fn),
        ("fp6_e2m3", ml_dtypes.float6_e2m3fn),
        ("fp4_e2m1", ml_dtypes.float4_e2m1fn),
        ("fp8_e4m3", ml_dtypes.float8_e4m3fn),
    ],
)
def test_same_numbers_as_ml_dtypes(name: str, other: type) -> None:
    fmt = formats.get(name)
    theirs = np.arange(1 << fmt.bits, dtype=np.uint8).view(other).astype(np.float32)
    known = ~np.isnan(theirs)
    assert known.sum() == (254 if name == "fp8_e4m3" else 1 << fmt.bits)
    ours = fmt.values().numpy()
    assert np.array_equal(ours[known], theirs[known])
    assert np.array_equal(np.signbit(ours), np.signbit(np.where(known, theirs, ours)))
    generator = torch.Generator().manual_seed(0)
    limit = float(theirs[known].max())
    x = (torch.randn(200_000, generator=generator) * limit / 3).clamp(-limit, limit)
    x[:1000] *= 1e-3
    assert np.array_equal(fmt.encode(x).numpy(), x.numpy().astype(other).view(np.uint8))


def test_round_gives_codes_and_values_in_one_pass() -> None:
    for name in (*FLOATS, *INTS):
        fmt = formats.get(name)
        x = torch.randn(5000) * fmt.max / 2
        codes, rounded = fmt.round(x.clone())
        assert torch.equal(codes, fmt.encode(x))
        assert torch.equal(rounded, fmt.decode(codes))
        if fmt.kind == "float":
            assert torch.equal(torch.signbit(rounded), torch.signbit(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_encode_takes_other_dtypes_and_leaves_them_alone(dtype: torch.dtype) -> None:
    x = torch.tensor([0.3, -7.7, 100.0], dtype=dtype)
    before = x.clone()
    assert torch.equal(formats.get("fp6").encode(x), formats.get("fp6").encode(x.float()))
    assert torch.equal(x, before)


def test_names() -> None:
    assert formats.get("fp6") == formats.get("fp6_e2m3")
    assert formats.get("fp5").name == "fp5_e2m2"
    with pytest.raises(FormatError, match=r"unknown format 'fp6_e4m2', did you mean 'fp6_e\dm\d'\?.*fp6_e3m2"):
        formats.get("fp6_e4m2")
    for bad in ("fp9_e4m4", "fp6_e0m5", "int9", "int1", "fp6_e3m3", "", "e3m2"):
        with pytest.raises(FormatError):
            formats.get(bad)


def test_schemes() -> None:
    scheme = formats.get_scheme("fp6_e3m2", 128, "bfloat16")
    assert formats.Scheme.from_key(scheme.key()) == scheme
    assert scheme.bits_per_weight(256) == 6 + 16 / 128
    assert formats.get_scheme("fp6").bits_per_weight(33) == (64 * 6 + 16) / 33
    mx = formats.get_scheme("mxfp6_e2m3")
    assert (mx.group_size, mx.scale_dtype, mx.name) == (32, "e8m0", "mxfp6_e2m3")
    assert mx.bits_per_weight(64) == 6.25
    assert formats.get_scheme("uint4", 32).bits_per_weight(64) == 4 + 24 / 32
    with pytest.raises(FormatError, match="group size 48 does not divide the 64 input channels"):
        formats.get_scheme("int4", 48).groups(64)
    for name, group, dtype in (
        ("mxfp6_e2m3", 64, None),
        ("mxfp6_e2m3", None, "float16"),
        ("int4", 0, None),
        ("int4", None, "float8"),
        ("uint4", None, "e8m0"),
        ("mxuint4", None, None),
    ):
        with pytest.raises(FormatError):
            formats.get_scheme(name, group, dtype)


def test_scales_keep_their_dtype_and_never_vanish() -> None:
    wanted = torch.tensor([[1e-9, 0.0, 0.1]])
    half = formats.store_scales(wanted, formats.get_scheme("fp6"))
    assert half.dtype == torch.float16
    assert half[0, 0] == 2.0**-24
    assert half[0, 1] == 0
    with pytest.raises(FormatError, match="beyond float16's largest"):
        formats.store_scales(torch.tensor([[1e6]]), formats.get_scheme("fp6"))
    for name in ("bfloat16", "float32"):
        scheme = formats.get_scheme("fp6", None, name)
        assert float(formats.scale_values(formats.store_scales(wanted, scheme), scheme)[0, 0]) > 0


def test_e8m0_scales_are_the_next_power_of_two() -> None:
    scheme = formats.get_scheme("mxfp6_e3m2")
    wanted = torch.tensor([[0.0, 2.0**-140, 2.0**-127, 0.5, 0.51, 1.0, 1.5, 2.0**127]])
    stored = formats.store_scales(wanted, scheme)
    assert stored.tolist() == [[0, 0, 0, 126, 127, 127, 128, 254]]
    expected = [2.0**-127, 2.0**-127, 2.0**-127, 0.5, 1.0, 1.0, 2.0, 2.0**127]
    assert formats.scale_values(stored, scheme).tolist() == [expected]
    every = torch.arange(255, dtype=torch.uint8).view(1, -1)
    assert torch.equal(formats.store_scales(formats.scale_values(every, scheme), scheme), every)
    with pytest.raises(FormatError, match="2\\^127"):
        formats.store_scales(torch.tensor([[3e38]]), scheme)


def test_tolerance_admits_float32_sums_and_refuses_wrong_ones() -> None:
    x, weight = torch.randn(4, 500).double(), torch.randn(6, 500).double()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        allowed = formats.product_tolerance(x, weight, dtype)
        exact = x @ weight.T
        rounded = (x.float() @ weight.float().T).to(dtype).double()
        assert ((rounded - exact).abs() <= allowed).all()
        one_missing = (x[:, 1:].float() @ weight[:, 1:].float().T).to(dtype).double()
        assert ((one_missing - exact).abs() > allowed).any()
