"""Round to nearest: scales from the largest magnitude, codes nearest to the weights."""

from __future__ import annotations

import math

import pytest
import torch

from tersor import formats
from tersor.compress import quantize_rtn
from tersor.errors import FormatError, NonFiniteError
from tersor.formats import ScaleError
from tersor.layouts import PackedWeight

CASES = [
    ("fp6_e3m2", None, None),
    ("fp6_e2m3", 32, "bfloat16"),
    ("fp5_e2m2", 48, "float32"),
    ("int4", 16, None),
    ("int8", None, "float32"),
    ("mxfp6_e2m3", None, None),
    ("mxfp4_e2m1", None, None),
    ("uint4", 32, None),
    ("uint2", None, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "group", "scale_dtype"), CASES)
def test_every_weight_gets_its_nearest_value(name: str, group: int, scale_dtype: str, dtype: torch.dtype) -> None:
    scheme = formats.get_scheme(name, group, scale_dtype)
    weight = (torch.randn(7, 96, generator=torch.Generator().manual_seed(3)) * 0.1).to(dtype)
    encoded = quantize_rtn(weight, scheme)
    groups = scheme.groups(96)
    scale = formats.scale_values(encoded.scale, scheme)
    assert encoded.scale.shape == (7, groups)
    assert encoded.scale.dtype == formats.SCALE_DTYPES[scheme.scale_dtype]
    offset = encoded.zero_point.double() if encoded.zero_point is not None else torch.zeros(7, groups).double()
    grid = (scheme.format.values().double() - offset[..., None]) * scale.double()[..., None]
    grouped = weight.double().view(7, groups, -1)
    nearest = (grouped[..., None] - grid[:, :, None, :]).abs().amin(dim=3)
    decoded = PackedWeight.from_encoded(encoded).dequantize().double().view(7, groups, -1)
    assert torch.allclose((decoded - grouped).abs(), nearest, rtol=0, atol=2e-5 * float(scale.max()))
    error = float(((decoded - grouped) ** 2).sum())
    assert encoded.squared_error == pytest.approx(error, rel=1e-3)
    assert encoded.squared_norm == pytest.approx(float((weight.double() ** 2).sum()), rel=1e-4)


def test_the_largest_weight_keeps_its_value() -> None:
    weight = torch.tensor([[0.3, -2.8, 1.0, 0.0]])
    encoded = quantize_rtn(weight, formats.get_scheme("fp6_e3m2", None, "float32"))
    assert float(encoded.scale) == pytest.approx(0.1)
    assert formats.get("fp6_e3m2").decode(encoded.codes)[0, 1] == -28


@pytest.mark.parametrize("name", ["fp6_e3m2", "int4", "uint4", "mxfp6_e3m2"])
def test_rows_of_zeros_decode_to_zero(name: str) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 5] = 0.5
    scheme = formats.get_scheme(name)
    encoded = quantize_rtn(weight, scheme)
    if scheme.scale_dtype == "float16":
        assert float(encoded.scale[0, 0]) == 0
    assert torch.equal(PackedWeight.from_encoded(encoded).dequantize()[0], weight[0])


def test_rows_do_not_influence_each_other() -> None:
    weight = torch.randn(10, 64)
    for name in ("fp6_e3m2", "uint4", "int8"):
        scheme = formats.get_scheme(name, 32)
        whole = quantize_rtn(weight, scheme)
        parts = [quantize_rtn(part, scheme) for part in weight.split(3)]
        assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
        assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))


def test_tiny_rows_survive_float16_scales() -> None:
    weight = torch.full((1, 32), 1e-7)
    scheme = formats.get_scheme("fp6_e3m2")
    decoded = PackedWeight.from_encoded(quantize_rtn(weight, scheme)).dequantize()
    assert torch.allclose(decoded, weight, rtol=0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["fp6_e3m2", "uint4", "mxfp6_e2m3"])
def test_non_finite_weights_are_named(name: str, bad: float) -> None:
    weight = torch.randn(4, 64).bfloat16()
    weight[2, 33] = bad
    with pytest.raises(NonFiniteError, match=r"\[2, 33\]") as caught:
        quantize_rtn(weight, formats.get_scheme(name))
    assert caught.value.index == (2, 33)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(FormatError, match="does not divide"):
        quantize_rtn(torch.randn(2, 100), formats.get_scheme("int4", 64))
    with pytest.raises(FormatError, match="beyond float16"):
        quantize_rtn(torch.full((1, 32), 1e30), formats.get_scheme("fp6"))


MAGNITUDES = [1e-44, 1e-38, 1e-30, 1e-12, 1e-7, 1.0, 1e6, 1e20, 1e30, 3e38]


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["fp6_e3m2", "int4", "uint4", "fp8_e5m2"])
def test_the_error_is_right_over_the_range_of_float32(name: str, scale_dtype: str, magnitude: float) -> None:
    weight = (torch.rand(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1) * magnitude
    encoded = quantize_rtn(weight.float(), formats.get_scheme(name, None, scale_dtype))
    decoded = encoded.dequantize().double()
    error = float(((decoded - weight.float().double()) ** 2).sum())
    norm = float((weight.float().double() ** 2).sum())
    assert decoded.isfinite().all()
    assert encoded.squared_error == pytest.approx(error, rel=1e-3, abs=0)
    assert encoded.squared_norm == pytest.approx(norm, rel=1e-3, abs=0)
    if magnitude > 1e-37:
        assert math.sqrt(encoded.squared_error / encoded.squared_norm) < 0.11 and encoded.underflowed == ()


def test_the_error_of_a_large_row_hides_nothing_of_a_small_one() -> None:
    weight = torch.cat([torch.full((1, 64), 1e25), torch.full((1, 64), 1e-25)])
    encoded = quantize_rtn(weight, formats.get_scheme("int4", None, "float32"))
    assert encoded.squared_norm == pytest.approx(64e50, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "scale_dtype", "value", "lost"),
    [
        ("fp6_e3m2", "float16", 1e-10, True),
        ("fp6_e3m2", "float16", 1e-7, True),
        ("fp6_e3m2", "float16", 1e-3, False),
        ("int4", "float16", 1e-8, True),
        ("uint4", "float16", 1e-30, True),
        ("fp6_e3m2", "bfloat16", 1e-10, False),
        ("fp6_e3m2", "bfloat16", 1e-36, False),
        ("fp6_e3m2", "bfloat16", 1e-44, True),
        ("fp6_e3m2", "float32", 1e-44, True),
        ("mxfp4_e2m1", None, 1e-30, False),
        ("mxfp4_e2m1", None, 1e-41, True),
        ("int8", "float16", 6e-5 * 127, False),
    ],
)
def test_a_scale_that_underflows_names_its_row(name: str, scale_dtype: str, value: float, lost: bool) -> None:
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(2))
    weight[1] = 0
    weight[2] = 0
    weight[2, 40] = -value
    weight[3, 8] = -0.0
    assert quantize_rtn(weight, formats.get_scheme(name, None, scale_dtype)).underflowed == ((2,) if lost else ())


@pytest.mark.parametrize("name", ["fp6_e3m2", "int4", "int8", "fp4_e2m1", "fp8_e4m3", "int3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_the_largest_weight_of_a_dtype_decodes_within_it(name: str, dtype: torch.dtype, scale_dtype: str) -> None:
    weight = torch.full((1, 32), torch.finfo(dtype).max, dtype=dtype)
    scheme = formats.get_scheme(name, None, scale_dtype)
    if scale_dtype == "float16" and dtype != torch.float16:
        with pytest.raises(ScaleError, match=r"in row 0 is beyond float16's largest.*use bfloat16 or float32 scales"):
            quantize_rtn(weight, scheme)
        return
    decoded = quantize_rtn(weight, scheme).dequantize()
    assert decoded.to(dtype).isfinite().all()
    assert torch.allclose(decoded.double(), weight.double(), rtol=0.01)


def test_a_block_that_decodes_beyond_its_own_dtype_is_refused_by_row() -> None:
    for value, dtype in ((3e38, "float32"), (65504, "float16")):
        weight = torch.ones(3, 32, dtype=getattr(torch, dtype))
        weight[2, 4] = value
        with pytest.raises(ScaleError, match=rf"weights of .* in row 2 decode beyond {dtype}'s largest") as caught:
            quantize_rtn(weight, formats.get_scheme("mxfp4_e2m1"))
        assert caught.value.row == 2


@pytest.mark.parametrize("name", ["fp6_e3m2", "int4", "mxfp4_e2m1"])
def test_negative_zeros_and_subnormals_decode_to_what_they_are(name: str) -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1], weight[0, 2] = 1.0, -0.0, 1e-42
    decoded = quantize_rtn(weight, formats.get_scheme(name)).dequantize()
    assert decoded[0, 1:].eq(0).all() and decoded[0, 0] == pytest.approx(1, rel=1e-3)
