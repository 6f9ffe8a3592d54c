"""Kernels against the formats: every code exact, products within the tolerance of a float32 accumulation."""

from __future__ import annotations

import pytest
import torch

from tersor import formats, ops
from tersor.compress import Encoded
from tersor.kernels.linear import COMPILED_FORMATS
from tersor.layouts import PackedWeight
from tersor.ops import dispatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float16, torch.bfloat16)


def random_weight(oc: int, ic: int, scheme: formats.Scheme, seed: int = 0, all_codes: bool = False) -> PackedWeight:
    """A weight of random codes (every code, subnormals and extremes among them) and random scales."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << scheme.format.bits, (oc, ic), dtype=torch.uint8, generator=generator)
    if all_codes:
        codes.view(-1)[: 1 << scheme.format.bits] = torch.arange(1 << scheme.format.bits, dtype=torch.uint8)
    wanted = torch.rand(oc, scheme.groups(ic), generator=generator) * 0.02 + 1e-3
    encoded = Encoded(codes, formats.store_scales(wanted, scheme), None, 0.0, 0.0)
    weight = PackedWeight.from_encoded(encoded, scheme)
    return PackedWeight(scheme, (oc, ic), weight.data.cuda(), weight.scale.cuda())


def check(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None, kernel: str) -> torch.Tensor:
    """Run the kernel expected to serve and compare with float64."""
    packed = weight.to_layout(ops.preferred_layout(weight.scheme, x.dtype, x.device))
    n = x.shape[0]
    assert dispatch.decide(weight.scheme, packed.layout, n, x.dtype, x.device).kernel == kernel
    y = ops.linear(x, packed, bias)
    exact_weight = weight.dequantize().double()
    if kernel == dispatch.DEQUANTIZE and weight.scheme.group_size is not None:
        exact_weight = weight.dequantize(x.dtype).double()
    exact = x.double() @ exact_weight.T
    allowed = formats.product_tolerance(x.double(), exact_weight, x.dtype)
    if bias is not None:
        exact += bias.double()
        allowed += bias.abs().double() * torch.finfo(x.dtype).eps
    worst = ((y.double() - exact).abs() / allowed).max()
    assert torch.isfinite(y).all()
    assert worst <= 1, f"error is {float(worst):.2f} of what is allowed"
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*COMPILED_FORMATS, "fp4_e3m0", "fp4_e1m2", "fp3_e2m0", "fp8_e4m3"])
def test_every_code_decodes_exactly(name: str, dtype: torch.dtype) -> None:
    """Columns of the identity pick single weights out of the fused kernel: what it decoded, times the scale."""
    scheme = formats.get_scheme(name, scale_dtype="float32")
    weight = random_weight(48, 64, scheme, all_codes=True)
    weight = PackedWeight(scheme, weight.shape, weight.data, torch.full_like(weight.scale, 0.5))
    packed = weight.to_layout(ops.preferred_layout(scheme, dtype, weight.data.device))
    identity = torch.eye(64, dtype=dtype, device="cuda")
    fused = ops.linear(identity, packed)
    assert torch.equal(fused.float(), weight.dequantize().T)
    many = torch.cat((identity, identity))
    assert dispatch.decide(scheme, packed.layout, 128, dtype, many.device).kernel == dispatch.DEQUANTIZE
    assert torch.equal(ops.linear(many, packed).float(), weight.dequantize().T.repeat(2, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [None, 128, 32, 64, 16, 80, 320])
@pytest.mark.parametrize("name", COMPILED_FORMATS)
def test_products_are_within_tolerance(name: str, group_size: int | None, dtype: torch.dtype) -> None:
    scheme = formats.get_scheme(name, group_size)
    generator = torch.Generator(device="cuda").manual_seed(1)
    for oc, ic in ((129, 640), (1, 1280), (400, 1920)):
        weight = random_weight(oc, ic, scheme)
        for n in (1, 7, 8, 9, 17, 33, 64, 65, 129):
            x = torch.randn(n, ic, dtype=dtype, device="cuda", generator=generator)
            bias = torch.randn(oc, dtype=dtype, device="cuda", generator=generator) if n % 2 else None
            check(weight, x, bias, dispatch.FUSED if n <= 64 else dispatch.DEQUANTIZE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes_strides_and_split_channels(dtype: torch.dtype) -> None:
    scheme = formats.get_scheme("fp6_e3m2")
    generator = torch.Generator(device="cuda").manual_seed(2)
    for oc, ic in ((63, 31), (17, 33), (256, 1000), (100, 129), (40, 9000), (2048, 2049)):
        weight = random_weight(oc, ic, scheme, seed=ic)
        for n in (1, 3, 16, 63, 64, 65, 200):
            kernel = dispatch.FUSED if n <= 64 else dispatch.DEQUANTIZE
            wide = torch.randn(n, ic + 3, dtype=dtype, device="cuda", generator=generator)
            plain = check(weight, wide[:, :ic].contiguous(), None, kernel)
            shifted = check(weight, wide[:, :ic], None, kernel)
            transposed = check(weight, wide[:, :ic].T.contiguous().T, None, kernel)
            if kernel == dispatch.FUSED:  # cuBLAS may choose another kernel for another alignment
                assert torch.equal(shifted, plain)
                assert torch.equal(transposed, plain)


def test_extreme_activations_propagate() -> None:
    """NaN and infinity reach exactly the rows of the tokens that hold them."""
    weight = random_weight(200, 300, formats.get_scheme("fp6_e2m3"))
    for n in (5, 100):
        x = torch.randn(n, 300, dtype=torch.float16, device="cuda")
        x[1, 7], x[3, 299] = float("nan"), float("inf")
        y = ops.linear(x, weight.to_layout("tiles_float16"))
        assert torch.isnan(y[1]).all()
        assert not torch.isfinite(y[3]).any()
        untouched = [row for row in range(n) if row not in (1, 3)]
        assert torch.isfinite(y[untouched]).all()


def test_no_tokens_and_more_dimensions() -> None:
    weight = random_weight(48, 96, formats.get_scheme("int4", 32)).to_layout("tiles_bfloat16")
    x = torch.randn(2, 3, 96, dtype=torch.bfloat16, device="cuda")
    assert ops.linear(x[:, :0], weight).shape == (2, 0, 48)
    assert torch.equal(ops.linear(x, weight).view(6, 48), ops.linear(x.view(6, 96), weight))


def test_repeated_runs_are_equal() -> None:
    """Split sums are added in a fixed order, whatever order the CTAs arrive in."""
    weight = random_weight(256, 8192, formats.get_scheme("fp6_e3m2")).to_layout("tiles_float16")
    x = torch.randn(16, 8192, dtype=torch.float16, device="cuda")
    first = ops.linear(x, weight)
    for _ in range(50):
        assert torch.equal(ops.linear(x, weight), first)


@pytest.mark.parametrize("n", [1, 16, 100])
def test_cuda_graph_replays_and_streams(n: int) -> None:
    weight = random_weight(256, 4096, formats.get_scheme("fp6_e3m2")).to_layout("tiles_float16")
    x = torch.randn(n, 4096, dtype=torch.float16, device="cuda")
    expected = ops.linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(ops.linear(x, weight)[:, :1].expand(n, 4096).contiguous() * 0 + x, weight)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.synchronize()
    for stream in streams * 5:
        with torch.cuda.stream(stream):
            results.append(ops.linear(x, weight))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_compiled_without_graph_breaks() -> None:
    weight = random_weight(128, 256, formats.get_scheme("fp6_e3m2")).to_layout("tiles_float16")
    x = torch.randn(4, 256, dtype=torch.float16, device="cuda")
    compiled = torch.compile(lambda x: ops.linear(x, weight) + 1, fullgraph=True)
    assert torch.equal(compiled(x), ops.linear(x, weight) + 1)


def test_layouts_are_undone_exactly_on_the_gpu() -> None:
    for name in COMPILED_FORMATS:
        weight = random_weight(70, 200, formats.get_scheme(name, 40 if name == "int4" else None))
        for layout in ("tiles_float16", "tiles_bfloat16"):
            back = weight.to_layout(layout).to_layout("stream") if name != "int4" else weight
            assert torch.equal(back.data, weight.data)
            assert torch.equal(back.scale, weight.scale)
