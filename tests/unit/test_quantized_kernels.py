"""Kernels of norms, and those that make e4m3 or int8 of rows, on a CPU, as C++: alone and both in one, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated

from tersor import ops
from tersor.formats import Activations
from tersor.kernels import norms, quantizing, small
from tersor.ops import Gate

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

BYTEWISE = (Activations.E4M3, Activations.INT8, Activations.INT8_GROUPS)
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a kernel that several tests launch is compiled once."""
    return tmp_path_factory.mktemp("kernels")


def scales_of(memory: torch.Tensor, rows: int, channels: int, activations: Activations) -> torch.Tensor:
    """Scales as `Activations.quantize` has them, [rows, 1] or [rows, groups], from where a kernel wrote them."""
    if activations.group_size is None:
        return memory.view(rows, 1)
    return memory.view(activations.scales(channels), quantizing.scales_stride(rows))[:, :rows].T.contiguous()


def normed(
    x: torch.Tensor,
    layer: bool,
    activations: Activations,
    ready: bool,
    folder: Path,
    warps: int = 0,
    **beside: torch.Tensor | None,
) -> list[torch.Tensor]:
    """What the kernel of a norm writes of rows, several of which are one CTA's: results, or codes and scales."""
    rows, channels = x.shape
    bytewise = activations is not Activations.NATIVE
    stride = quantizing.codes_stride(channels) if bytewise else channels
    function = Emulated(norms.norm_source(NAMES[x.dtype], layer, channels, activations, warps), folder, 900)
    sizes = {"rows": rows, "channels": channels, "sms": 1, "sm_threads": 2048, "warps": warps}
    launch = norms.prepare_norm(function, eps=1e-5, offset=0.0 if layer else 1.0, **sizes)  # type: ignore[arg-type]
    out = torch.full((rows, stride), 0x5A, dtype=torch.uint8 if bytewise else x.dtype)
    size = quantizing.quantized_bytes(rows, channels, activations) - rows * quantizing.codes_stride(channels)
    scales = torch.full((size // 4,), torch.nan)
    places = {name: 0 if one is None else one.data_ptr() for name, one in beside.items()}
    places |= {"x": x.data_ptr(), "out": out.data_ptr(), "scales": scales.data_ptr() if bytewise else 0}
    launch(stream=0, stride=x.stride(0), out_stride=stride, ready=ready, early=True, **places)
    return [out[:, :channels], scales_of(scales, rows, channels, activations)] if bytewise else [out]


def quantised(
    x: torch.Tensor,
    folder: Path,
    order: torch.Tensor | None = None,
    top_k: int = 1,
    activations: Activations = Activations.E4M3,
    gate: int = 0,
    relu: bool = False,
) -> list[torch.Tensor]:
    """The codes, as bytes, and the scales that the kernel makes of rows, or of what an activation makes of them."""
    n, ic = len(x if order is None else order), x.shape[1] // (2 if gate else 1)
    row = quantizing.codes_stride(ic)
    memory = torch.full((quantizing.quantized_bytes(n, ic, activations),), 0x5A, dtype=torch.uint8)
    function = Emulated(quantizing.quantize_source(NAMES[x.dtype], activations, gate, relu), folder, 900)
    launch = quantizing.prepare_quantize(function, n=n, ic=ic, activations=activations)  # type: ignore[arg-type]
    places = {"x": x.data_ptr(), "codes": memory.data_ptr(), "order": 0 if order is None else order.data_ptr()}
    assert launch(stream=0, x_stride=x.stride(0), top_k=top_k, **places) == memory.data_ptr() + n * row
    scales = scales_of(memory[n * row :].view(torch.float32), n, ic, activations)
    return [memory[: n * row].view(n, row)[:, :ic], scales]


def rows_of(rows: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of several sizes within longer ones, of which one is zeros and two have what is not finite."""
    generator = torch.Generator().manual_seed(channels)
    wide = torch.randn(rows, channels + 8, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    wide[0] = 0
    wide[1, 3], wide[2, 5] = math.nan, -math.inf
    return wide.to(dtype)[:, :channels]


@pytest.mark.parametrize("activations", BYTEWISE)
@pytest.mark.parametrize(
    ("rows", "channels", "dtype", "layer", "more"),
    [
        (19, 264, torch.float16, False, True),
        (19, 264, torch.bfloat16, True, True),
        (5, 4096, torch.bfloat16, False, False),
        (4, 8200, torch.float16, True, False),
    ],
)
def test_a_norm_that_quantises_gives_the_bits_of_a_norm_and_of_quantising(
    rows: int, channels: int, dtype: torch.dtype, layer: bool, more: bool, activations: Activations, folder: Path
) -> None:
    """`more` is a bias or a residual, and weights that were there before the kernel ahead."""
    x = rows_of(rows, channels, dtype)
    weight, bias = torch.randn(2, channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    residual = x.flip(0).contiguous()
    beside = {"weight": weight, "bias": bias if layer and more else None}
    beside["residual"] = residual if more and not layer else None
    (alone,) = normed(x, layer, Activations.NATIVE, more, folder, **beside)
    if layer:
        expected = ops.layer_norm(x, weight, beside["bias"], 1e-5)
    else:
        expected = ops.rms_norm(x, weight, 1e-5, offset=1.0, residual=beside["residual"])
    torch.testing.assert_close(alone, expected, rtol=torch.finfo(dtype).eps, atol=2e-5, equal_nan=True)
    codes, scales = normed(x, layer, activations, more, folder, **beside)
    both_codes, both_scales = quantised(alone, folder, activations=activations)
    assert torch.equal(codes, both_codes)
    assert torch.equal(scales.view(torch.int32), both_scales.contiguous().view(torch.int32))
    whole = activations.dtype is torch.int8
    assert scales.isnan().any(dim=1).tolist() == [whole and 0 < row < 3 for row in range(rows)] or more


@pytest.mark.parametrize("activations", BYTEWISE)
@pytest.mark.parametrize(
    ("rows", "channels", "dtype"),
    [(9, 264, torch.float16), (13, 4096, torch.bfloat16), (6, 5120, torch.float16)],
)
def test_a_warp_gives_a_row_the_bits_that_a_cta_gives_it(
    rows: int, channels: int, dtype: torch.dtype, activations: Activations, folder: Path
) -> None:
    """Warps of one CTA have all rows, some two or three of them."""
    x = rows_of(rows, channels, dtype)
    weight = torch.randn(channels, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert norms.ctas_of_warps(rows, channels, sms=0) > 0
    beside = {"weight": weight, "bias": None, "residual": None}
    for ready in (True, False):
        few = normed(x, False, activations, ready, folder, **beside)
        many = normed(x, False, activations, ready, folder, 1, **beside)
        for one, other in zip(few, many, strict=True):
            assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [
        (8, torch.float16),
        (100, torch.bfloat16),
        (1001, torch.float16),
        (14336, torch.bfloat16),
        (33000, torch.float16),
    ],
)
def test_rows_are_quantised_as_the_torch_code_says(channels: int, dtype: torch.dtype, folder: Path) -> None:
    x = rows_of(3, channels, dtype)
    for rows in (x, x.contiguous()):
        codes, scales = quantised(rows, folder)
        expected, expected_scales = Activations.E4M3.quantize(rows.float())
        found = codes.contiguous().view(torch.float8_e4m3fn).float()
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("activations", [Activations.INT8, Activations.INT8_GROUPS])
@pytest.mark.parametrize(("channels", "dtype"), [(8, torch.float16), (1001, torch.bfloat16), (33000, torch.float16)])
def test_rows_become_int8_as_the_torch_code_says(
    channels: int, dtype: torch.dtype, activations: Activations, folder: Path
) -> None:
    """A row, or a group, with what is not finite has the scale NaN, whatever its codes; of tiny numbers codes are 0."""
    x = rows_of(5, channels, dtype)
    x[4] = 2.0**-133 if dtype == torch.bfloat16 else 2.0**-24
    codes, scales = quantised(x, folder, activations=activations)
    expected, expected_scales = activations.quantize(x.float())
    finite = [0, 3, 4]
    assert torch.equal(codes.contiguous().view(torch.int8)[finite], expected[finite])
    assert expected[3].abs().max() == 127 and expected[4].unique().tolist() == [0 if dtype == torch.bfloat16 else 127]
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    assert scales.isnan().sum(dim=1).tolist() == [0, 1, 1, 0, 0]


def test_rows_of_pairs_are_those_of_their_tokens(folder: Path) -> None:
    x, order = rows_of(5, 136, torch.float16), torch.tensor([9, 0, 3, 7, 6, 2, 5], dtype=torch.int32)
    codes, scales = quantised(x, folder, order, top_k=2)
    of_tokens, of_tokens_scales = quantised(x, folder)
    tokens = order.long() // 2
    assert torch.equal(codes, of_tokens[tokens]) and torch.equal(scales, of_tokens_scales[tokens])


@pytest.mark.parametrize("activations", BYTEWISE)
@pytest.mark.parametrize(
    ("gate", "channels", "dtype"),
    [
        (Gate.SILU, 264, torch.float16),
        (Gate.GELU_TANH, 4096, torch.bfloat16),
        (Gate.GELU, 136, torch.float16),
        (Gate.CLAMPED, 33000, torch.bfloat16),
        (None, 264, torch.bfloat16),
    ],
)
def test_an_activation_that_quantises_gives_the_bits_of_an_activation_and_of_quantising(
    gate: Gate | None, channels: int, dtype: torch.dtype, activations: Activations, folder: Path
) -> None:
    """Rows of gate and up lie in longer ones; those that fit in no registers are made twice."""
    x, number = rows_of(4, channels * (1 if gate is None else 2), dtype), int(gate or 0)
    given, alone = x.contiguous(), torch.empty(4, channels, dtype=dtype)
    function = Emulated(small.pointwise_source(NAMES[dtype], number, False), folder, 900)
    launch = small.prepare_pointwise(function, rows=4, channels=channels, cap=0.0)  # type: ignore[arg-type]
    launch(stream=0, x=given.data_ptr(), out=alone.data_ptr(), early=True)
    expected_codes, expected_scales = quantised(alone, folder, activations=activations)
    for rows in (x, given):
        codes, scales = quantised(rows, folder, activations=activations, gate=number, relu=gate is None)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(scales.contiguous().view(torch.int32), expected_scales.contiguous().view(torch.int32))
