"""8-bit activations on the FP8 tensor cores, against a float64 product of the same quantised numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.chains import check_chain

from tersor import formats, hardware, ops
from tersor.compress import quantize_rtn
from tersor.formats import Activations
from tersor.kernels import dense, jit, quantizing
from tersor.kernels.tune import sm90
from tersor.layouts import PackedWeight
from tersor.ops import current, dispatch
from tersor.ops.norm import TARGETS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)

REPEATS = 60
"""Launches of one product, one upon the other."""
ACCUMULATION = 2.0**-11
"""Of the sum of magnitudes of independent products: 512 channels meet in sums of about 14 bits, to which each 32 of
them are cut. Products of one sign lose more (`helpers.e4m3_sums`)."""


def packed(name: str, group_size: int | None, oc: int, ic: int) -> tuple[PackedWeight, torch.Tensor]:
    """A random weight in the layout for 8-bit activations, and its values."""
    torch.manual_seed(oc + ic)
    scheme = formats.get_scheme(name, group_size)
    weight = PackedWeight.from_encoded(quantize_rtn(torch.randn(oc, ic, device="cuda"), scheme))
    return weight.to_layout(dispatch.E4M3_LAYOUT), weight.dequantize(torch.float64)


def check(
    x: torch.Tensor, weight: PackedWeight, values: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compare with the product of what the reference quantises on a CPU."""
    y = ops.linear(x, weight, bias)
    codes, scale = Activations.E4M3.quantize(x.float().cpu())
    quantised = (codes.double() * scale.double()).cuda()
    exact = quantised @ values.T
    allowed = ACCUMULATION * (quantised.abs() @ values.abs().T)
    if bias is not None:
        exact += bias.double()
    allowed += exact.abs() * torch.finfo(x.dtype).eps + torch.finfo(x.dtype).tiny
    worst = float(((y.double() - exact).abs() / allowed).max())
    assert worst <= 1, f"error is {worst:.2f} of what is allowed"
    return y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        ("fp6_e3m2", None),
        ("fp6_e2m3", None),
        ("fp6_e2m3", 128),
        ("fp6_e3m2", 32),
        ("fp5_e2m2", None),
        ("fp5_e3m1", 64),
        ("fp4_e2m1", 128),
        ("uint4", 128),
        ("uint4", None),
        ("uint3", 64),
        ("int5", None),
        ("int4", 32),
        ("uint1", 256),
    ],
)
def test_products(name: str, group_size: int | None, dtype: torch.dtype) -> None:
    weight, values = packed(name, group_size, 200, 1280)
    bias = torch.randn(200, device="cuda").to(dtype)
    for n in (1, 7, 16, 17, 33, 65, 129, 300):
        check(torch.randn(n, 1280, device="cuda").to(dtype), weight, values, bias)


def test_odd_sizes_and_strides() -> None:
    for oc, ic in ((1, 1), (65, 100), (777, 1001), (128, 8192)):
        weight, values = packed("fp6_e3m2", None, oc, ic)
        wide = torch.randn(40, ic + 3, device="cuda").half()
        for x in (wide[:, :ic], wide[::3, 3:], torch.randn(ic, 9, device="cuda").half().T):
            check(x, weight, values)
    assert ops.linear(torch.empty(0, 8192, device="cuda").half(), weight).shape == (0, 128)


@pytest.mark.parametrize(("name", "group_size"), [("fp6_e3m2", None), ("int4", None), ("uint4", 128)])
@pytest.mark.parametrize("tile", sm90.tiles(0, Activations.E4M3), ids=str)
def test_every_tile_in_turn_and_in_parts(tile: sm90.Tile, name: str, group_size: int | None) -> None:
    """A few CTAs that take several items each, split tiles among them."""
    if group_size is not None and not (tile.grouped or tile.in_pieces):
        pytest.skip("scales in groups need a second set of sums")
    chip = hardware.of_device(0)
    oc, ic, n = 700, 1152 if group_size else 1100, 3 * tile.tokens - 5
    weight, values = packed(name, group_size, oc, ic)
    scheme = weight.scheme
    x = torch.randn(n, ic, device="cuda").half()
    problem = dense.problem_of(scheme, (oc, ic), n, activations=Activations.E4M3)
    for whole, splits, ctas in ((0, 1, 4), (0, 3, 8), (4, 2, 4)):
        config = sm90.config(problem, tile, whole, splits, ctas * tile.cluster, chip)
        with ops.using(config=config):
            first = check(x, weight, values)
            others = [ops.linear(x, weight) for _ in range(REPEATS)]
        different = sum(not torch.equal(first, other) for other in others)
        assert not different, f"{config}: {different} of {REPEATS} results differ"


def test_extremes_and_zeros() -> None:
    weight, values = packed("fp6_e2m3", None, 128, 512)
    x = torch.randn(6, 512, device="cuda").half()
    x *= torch.tensor([[1e-7], [1e-4], [0.0], [1.0], [1e2], [6e2]], device="cuda").half()
    assert not check(x, weight, values)[2].any()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels write lies in memory full of NaN."""

    def full(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        reach = 1 + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
        memory = torch.full((reach * dtype.itemsize,), 255, dtype=torch.uint8, device="cuda")
        return memory.view(dtype).as_strided(size, stride)

    monkeypatch.setattr(current, "empty", full)


def two_steps(plain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, as bytes, and scales that the kernel which quantises alone makes of rows."""
    n, ic = plain.shape
    row = quantizing.codes_stride(ic)
    memory = torch.full((n * (row + 4),), 255, dtype=torch.uint8, device="cuda")
    function = jit.get(quantizing.quantize_source(TARGETS[plain.dtype], Activations.E4M3), 0)
    launch = quantizing.prepare_quantize(function, n=n, ic=ic, activations=Activations.E4M3)
    launch(stream=current.stream(0), x=plain.data_ptr(), x_stride=ic, codes=memory.data_ptr())
    return memory[: n * row].view(n, row)[:, :ic], memory[n * row :].view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [264, 4096, 5120, 14336])
def test_a_norm_that_quantises_gives_the_bits_of_two_steps(channels: int, dtype: torch.dtype, poisoned: None) -> None:
    generator = torch.Generator(device="cuda").manual_seed(channels)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    product, _ = packed("fp6_e3m2", None, 200, channels)
    for tokens in (1, 7, 33, 985, 2500):
        x, residual, weight, bias = (
            some(tokens, channels) * 3 + 1,
            some(tokens, channels),
            some(channels),
            some(channels),
        )
        x[tokens // 2, 1] = math.nan
        x[tokens - 1] = 0
        assert ops.takes_quantized(x, (product,), weight)
        pairs: list[tuple[Callable[[], ops.Quantized], torch.Tensor]] = [
            (lambda: ops.rms_norm_quantized(x, weight, 1e-6), ops.rms_norm(x, weight, 1e-6)),  # noqa: B023
            (
                lambda: ops.rms_norm_quantized(x, weight, 1e-6, offset=1.0, residual=residual),  # noqa: B023
                ops.rms_norm(x, weight, 1e-6, offset=1.0, residual=residual),
            ),
            (lambda: ops.layer_norm_quantized(x, weight, bias, 1e-5), ops.layer_norm(x, weight, bias, 1e-5)),  # noqa: B023
        ]
        for call, plain in pairs:
            codes, scales = two_steps(plain)
            expected, expected_scales = Activations.E4M3.quantize(plain.float().cpu())
            torch.testing.assert_close(
                codes.contiguous().view(torch.float8_e4m3fn).float().cpu(),
                expected.float(),
                rtol=0,
                atol=0,
                equal_nan=True,
            )
            assert torch.equal(scales.cpu(), expected_scales[:, 0])
            for _ in range(20):
                rows = call()
                assert torch.equal(rows.codes.view(torch.uint8), codes) and torch.equal(rows.scales, scales)
            y = ops.linear_quantized(rows, product)
            torch.testing.assert_close(y, ops.linear(plain, product), rtol=0, atol=0, equal_nan=True)


def test_a_chain_of_norms_that_quantise_is_that_of_launches_that_wait() -> None:
    """Each step reads what the kernel just ahead wrote, and a graph replays them."""
    there, back = (packed("fp6_e3m2", None, *shape)[0] for shape in ((512, 1024), (1024, 512)))
    weights = [torch.randn(size, device="cuda").half() for size in (1024, 512)]
    x = torch.randn(700, 1024, device="cuda").half()

    def chain() -> torch.Tensor:
        y = x
        for _ in range(10):
            inner = ops.linear_quantized(ops.rms_norm_quantized(y, weights[0], 1e-6), there)
            y = ops.linear_quantized(ops.rms_norm_quantized(inner, weights[1], 1e-6), back, residual=y)
        return y

    _, result = check_chain(chain)
    assert result.isfinite().all()
