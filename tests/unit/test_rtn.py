"""Round to nearest: scales from the largest magnitude, codes nearest to the weights."""

from __future__ import annotations

import pytest
import torch

from tersor import formats
from tersor.compress import quantize_rtn
from tersor.errors import FormatError, NonFiniteError
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
    assert formats.get("fp6").decode(encoded.codes)[0, 1] == -28


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
