"""Activations quantised to int8: what it means, and which weights and sums it does not fit."""

from __future__ import annotations

from dataclasses import replace as replaced

import pytest
import torch
from helpers.fakes import FakeGpu, pretended

from tersor import ops
from tersor.compress import quantize_rtn
from tersor.errors import FormatError, ShapeError, UnsupportedError
from tersor.formats import Activations, get_scheme, scale_values
from tersor.layouts import PackedWeight, ratios
from tersor.ops import dispatch

gpu = pretended("NVIDIA H200")
INT8, GROUPS = Activations.INT8, Activations.INT8_GROUPS


def packed(name: str, oc: int = 24, ic: int = 96, group_size: int | None = None) -> PackedWeight:
    generator = torch.Generator().manual_seed(oc + ic)
    weight = torch.randn(oc, ic, generator=generator) + 0.2
    return PackedWeight.from_encoded(quantize_rtn(weight, get_scheme(name, group_size)))


def test_a_token_is_scaled_to_the_largest_code_and_rounded_to_nearest_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.5], [254.0, 1.0, 3.0, -5.0, 253.0], [0.0] * 5, [1e-40] * 5])
    codes, scale = INT8.quantize(x)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[127, 0, 2, -2, -126], [127, 0, 2, -2, 126], [0] * 5, [0] * 5]
    assert scale[:3, 0].tolist() == [1.0, 2.0, 0.0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator) * torch.logspace(-30, 30, 50)[:, None]
    codes, scale = INT8.quantize(x)
    assert codes.abs().amax(dim=1).tolist() == [127] * 50
    assert ((INT8.dequantize(codes, scale) - x).abs() <= scale * 0.5001).all()


def test_each_group_of_a_token_is_scaled_by_itself() -> None:
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    x[:, 128:256] *= 100
    x[1, 256:] = 0
    codes, scale = GROUPS.quantize(x)
    assert [part.shape for part in GROUPS.quantize(x[:0])] == [(0, 300), (0, 3)]
    assert codes.shape == x.shape and scale.shape == (3, 3) == (3, GROUPS.scales(300)) and scale[1, 2] == 0
    for group, first in enumerate(range(0, 300, 128)):
        own_codes, own_scale = INT8.quantize(x[:, first : first + 128])
        assert torch.equal(codes[:, first : first + 128], own_codes) and torch.equal(scale[:, group], own_scale[:, 0])
    assert torch.equal(GROUPS.dequantize(codes, scale)[:, 256:], codes[:, 256:] * scale[:, 2:])
    strided = GROUPS.quantize(x[:, :256].T.contiguous().T)
    assert torch.equal(strided[0], codes[:, :256]) and torch.equal(strided[1], scale[:, :2])


@pytest.mark.parametrize(("name", "group_size"), [("int8", None), ("uint4", 128), ("uint3", 32), ("uint5", 96)])
def test_scales_of_groups_meet_weights_with_and_without_groups(name: str, group_size: int | None) -> None:
    """The product is that of what codes and scales stand for, alone and of rows that a norm made bytes of."""
    weight = packed(name, ic=384, group_size=group_size)
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 384)
    placed = weight.to_layout(ops.preferred_layout(weight.scheme, torch.float32, x.device, GROUPS))
    assert placed.layout == dispatch.INT8_GROUPS_LAYOUT
    expected = GROUPS.dequantize(*GROUPS.quantize(x)).double() @ weight.dequantize(torch.float64).T
    torch.testing.assert_close(ops.linear(x, placed).double(), expected, rtol=1e-5, atol=1e-4)
    rows = ops.Quantized.of(x, GROUPS)
    assert torch.equal(ops.linear_quantized(rows, placed), ops.linear(x, placed))
    with pytest.raises(ShapeError, match=r"scales are \[5\] .*, expected \[5, 3\]"):
        ops.linear_quantized(ops.Quantized(rows.codes, rows.scales[:, 0], rows.dtype), placed)


@pytest.mark.parametrize(
    ("name", "group_size"),
    [("int8", None), ("int4", None), ("uint4", None), ("uint6", 32), ("int8", 96)],
)
def test_the_layout_says_that_activations_are_whole_numbers(name: str, group_size: int | None) -> None:
    """The product is that of int64, group by group, times scales."""
    weight = packed(name, group_size=group_size)
    x, bias = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)), torch.arange(24.0)
    codes, scale = INT8.quantize(x)
    (scales, zero_point), numbers = weight.stored_scales(), weight.scheme.format.decode(weight.codes())
    groups = weight.scheme.groups(96)
    whole = numbers.view(24, groups, -1) - (0 if zero_point is None else zero_point.float()[:, :, None])
    sums = torch.einsum("tgk,ogk->tog", codes.long().view(7, groups, -1), whole.long())
    row_scales = scale_values(scales, weight.scheme).double()
    expected = (sums.double() * row_scales).sum(dim=2) * scale.double() + bias.double()
    y = ops.linear(x, weight.to_layout(dispatch.INT8_LAYOUT), bias)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    if group_size is None:
        exact = (sums[:, :, 0].float() * scale) * row_scales.T.float()
        assert torch.equal(ops.linear(x, weight.to_layout(dispatch.INT8_LAYOUT)), exact)
    assert not torch.allclose(y, ops.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "group_size"), [("uint4", 32), ("int4", 96), ("uint5", 32), ("int3", 96), ("uint1", 32)]
)
def test_codes_in_groups_become_whole_numbers_of_their_row(name: str, group_size: int) -> None:
    """By whole ratios of their scales, so that a row's sum is whole; a weight is off by half a 127th of the largest."""
    weight = packed(name, group_size=group_size)
    numbers, row_scale = ratios.whole_numbers(weight.codes(), *weight.stored_scales(), weight.scheme)
    assert numbers.abs().max() <= 127 and torch.equal(numbers, numbers.round())
    codes_off = 2.0**weight.scheme.format.bits * 0.5 / 256  # what a ratio is rounded by, for the furthest code
    off = (numbers * row_scale - weight.dequantize()).abs() / row_scale
    assert 0.25 < off.max() <= 0.5 + codes_off + 1e-3
    x, bias = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)), torch.arange(24.0)
    codes, scale = INT8.quantize(x)
    exact = (codes.long() @ numbers.long().T).float() * scale
    placed = weight.to_layout(dispatch.INT8_LAYOUT)
    assert torch.equal(ops.linear(x, placed), exact * row_scale.T)
    biased = ((exact.double() * row_scale.T.double()) + bias.double()).float()
    assert torch.equal(ops.linear(x, placed, bias), biased)
    assert torch.equal(placed.dequantize(), weight.dequantize()), "the weight itself is what it was"


def test_a_row_of_zeros_and_one_beyond_float16_have_whole_numbers() -> None:
    scheme = get_scheme("int4", 32)
    weight = PackedWeight.from_encoded(quantize_rtn(torch.cat((torch.zeros(1, 64), torch.ones(1, 64))), scheme))
    numbers, row_scale = ratios.whole_numbers(weight.codes(), *weight.stored_scales(), scheme)
    assert numbers[0].tolist() == [0.0] * 64 and (numbers[1] * row_scale[1] - 1).abs().max() < 0.01
    scale, _ = weight.stored_scales()
    endless = replaced(weight, scale=torch.full_like(scale, torch.inf))
    assert ops.linear(torch.ones(1, 64), endless.to_layout(dispatch.INT8_LAYOUT)).isnan().all()


def test_weights_that_do_not_fit_int8_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="uint8 less its zero point does not fit int8"):
        ops.preferred_layout(get_scheme("uint8"), torch.float16, torch.device("cpu"), "int8")
    weight = packed("uint4")
    assert weight.zero_point is not None
    far = replaced(weight, zero_point=torch.full_like(weight.zero_point, 200))
    with pytest.raises(FormatError, match="a zero point of 200 in uint4 is beyond what int8 takes"):
        far.to_layout(dispatch.INT8_LAYOUT)


def test_more_channels_than_whole_sums_may_have_are_refused_by_the_kernels(gpu: FakeGpu) -> None:
    most = dispatch.MOST_WHOLE_CHANNELS
    assert most * 128 * 127 < 2**31 < 2 * most * 128 * 127
    assert ops.explain(get_scheme("int8"), 64, most, 5, activations="int8").kernel == dispatch.FUSED
    reason = ops.explain(get_scheme("int8"), 64, most + 8, 5, activations="int8")
    assert reason.kernel == dispatch.REFERENCE and "32 bits do not hold the sums" in reason.why
    by_ratios = ops.explain(get_scheme("uint4", 128), 64, most + 128, 5, activations="int8")
    assert by_ratios.kernel == dispatch.REFERENCE and by_ratios.why == reason.why.replace(
        str(most + 8), str(most + 128)
    )
    in_groups = ops.explain(get_scheme("int8", 128), 64, most + 128, 5, activations="int8")
    assert in_groups.kernel == dispatch.FUSED and "quantised to int8" in in_groups.why


@pytest.mark.parametrize(
    ("layout", "word"), [(dispatch.INT8_LAYOUT, "int8"), (dispatch.INT8_GROUPS_LAYOUT, "int8_g128")]
)
def test_a_product_launches_the_quantising_of_its_activations_and_itself(layout: str, word: str, gpu: FakeGpu) -> None:
    weight, x = packed("uint4", 64, 256, 128).to_layout(layout), torch.randn(5, 256).half()
    ops.linear(x, weight)
    quantising, product = gpu.launches[-2:]
    assert quantising.kernel.endswith(f"quantize_activations_float16_{word}")
    assert f"linear_sm90_uint4_{word}_float16" in product.kernel
    assert product["x_map"].address == quantising["codes"] and product["x_scale"] == quantising["scales"] > 0
