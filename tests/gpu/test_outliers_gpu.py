"""Outliers on a GPU: products within tolerance by every kernel, wherever they stand, in graphs and as layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tersor import formats, ops
from tersor.compress import encode
from tersor.formats import Activations, Outliers, Scheme, get_scheme
from tersor.layouts import STREAM, PackedWeight, stream
from tersor.nn import PackedLinear
from tersor.ops import Gate, dense, outlier_sums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float16, torch.bfloat16)
SCHEMES = (("int4", 128), ("uint4", 64), ("uint3", 128), ("fp4_e2m1", None), ("fp6_e2m3", None), ("fp8_e4m3", None))
TOKENS = (1, 2, 3, 4, 5, 8, 13, 16, 17, 31, 33, 48, 64, 65, 300)


def scheme(name: str, group_size: int | None, percent: float = 0.5, kept: str = "bfloat16") -> Scheme:
    """Return a scheme with outliers."""
    return replace(get_scheme(name, group_size), outliers=Outliers(percent, kept))


def weight_of(of: Scheme, oc: int, ic: int, dtype: torch.dtype, seed: int = 0) -> PackedWeight:
    """Return a random weight on the GPU, in the layout for activations of a dtype."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(oc, ic, generator=generator) / ic**0.5
    plain = torch.where(torch.rand(oc, ic, generator=generator) < 0.01, 20 * plain, plain).bfloat16()
    packed = PackedWeight.from_encoded(encode(plain.cuda(), of))
    return packed.to_layout(ops.preferred_layout(of, dtype, torch.device("cuda")))


def rows(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Return random activations on the GPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def check(
    y: torch.Tensor, exact: torch.Tensor, x: torch.Tensor, decoded: torch.Tensor, ahead: torch.Tensor | None
) -> None:
    """Hold a product against its exact numbers, rounded once to the dtype of the result.

    `ahead`: exact numbers that another kernel summed up and rounded before the product was added, which may be far
    greater than what comes of them; `None`: nothing.
    """
    allowed = formats.product_tolerance(x.double(), decoded, torch.float32)
    info = torch.finfo(y.dtype)
    for rounded in (exact, ahead):
        if rounded is not None:
            allowed = allowed + (rounded.abs() + allowed) * info.eps / 2 * 1.001 + info.smallest_normal * info.eps
    assert bool(((y.double() - exact).abs() <= allowed).all())


def added(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return exactly what outliers add."""
    return x.double() @ (weight.dequantize().double() - weight.dense.dequantize().double()).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "group_size"), SCHEMES)
@pytest.mark.parametrize(("oc", "ic"), [(320, 1024), (1000, 640), (2048, 4096)])
def test_products_are_within_tolerance(name: str, group_size: int | None, oc: int, ic: int, dtype: torch.dtype) -> None:
    weight = weight_of(scheme(name, group_size), oc, ic, dtype)
    decoded = weight.dequantize().double()
    for n in TOKENS:
        x, bias, residual = rows(n, ic, dtype=dtype), rows(oc, dtype=dtype, seed=2), rows(n, oc, dtype=dtype, seed=3)
        exact = x.double() @ decoded.T
        inside = weight.arranged is not None and torch.cuda.get_device_capability() == (9, 0)
        check(ops.linear(x, weight), exact, x, decoded, None if inside else added(x, weight))
        y = ops.linear(x, weight, bias, residual=residual)
        ahead = None if inside else added(x, weight) + residual.double()
        check(y, exact + bias.double() + residual.double(), x, decoded, ahead)


@pytest.mark.parametrize("places", ["column", "first", "row"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_may_stand_anywhere(places: str, dtype: torch.dtype) -> None:
    of, (oc, ic) = scheme("int4", 128, 2, "float16"), (1000, 1024)
    weight = weight_of(of, oc, ic, dtype)
    assert weight.outliers is not None
    columns, count = formats.outlier_columns(weight.outliers), weight.outliers.shape[1]
    if places == "column":
        columns[:, 0] = torch.where((columns == 77).any(dim=1), columns[:, 0], 77)
    elif places == "first":
        columns = torch.arange(count, device="cuda").expand_as(columns).contiguous()
    values = rows(oc, count, dtype=torch.bfloat16, seed=6).half()  # either dtype has them
    if places == "row":
        values[torch.arange(oc, device="cuda") % 64 != 5] = 0
    stored = weight.dense.to_layout(STREAM)
    codes = stored.codes().scatter_(1, columns, of.format.zero_code)
    data = stream.pack(codes, of.format.bits)
    words = formats.outlier_words(columns, values)
    made = PackedWeight(of, (oc, ic), data, stored.scale, None, outliers=words).to_layout(weight.layout)
    decoded = made.dequantize().double()
    for n in TOKENS:
        x = rows(n, ic, dtype=dtype)
        inside = made.arranged is not None and torch.cuda.get_device_capability() == (9, 0)
        check(ops.linear(x, made), x.double() @ decoded.T, x, decoded, None if inside else added(x, made))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_both_ways_agree_and_give_the_same_bits_again(dtype: torch.dtype, kept: str) -> None:
    weight = weight_of(scheme("int4", 128, 2, kept), 1536, 2048, dtype)
    own = weight.dense
    for n in TOKENS:
        x = rows(n, 2048, dtype=dtype)
        y = ops.linear(x, weight)
        ahead = dense.multiply(x, own, None, outlier_sums.add(x, weight, None), 0)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y.float(), ahead.float(), rtol=4 * eps, atol=4 * eps)
        assert torch.equal(y, ops.linear(x, weight))


@pytest.mark.parametrize("gate", [Gate.SILU, Gate.GELU_TANH])
def test_a_gate_comes_after_the_outliers(gate: Gate) -> None:
    of = scheme("fp6_e2m3", None, 1)
    plain = [PackedWeight.from_encoded(encode(rows(768, 1024, dtype=torch.bfloat16, seed=s) / 32, of)) for s in (4, 5)]
    weight = PackedWeight.gate_up(*plain)
    weight = weight.to_layout(ops.preferred_layout(of, torch.bfloat16, torch.device("cuda")))
    for n in (1, 7, 40, 64, 200):
        x = rows(n, 1024, dtype=torch.bfloat16)
        one, two = (x.float() @ part.dequantize().T for part in plain)
        expected = gate.combine(one, two)
        found = ops.gated_linear(x, weight, gate=gate)
        torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6)


def test_rows_that_start_anywhere_and_tokens_of_batches_are_served() -> None:
    weight = weight_of(scheme("int4", 128), 512, 1024, torch.float16)
    wide = rows(2, 9, 1031, dtype=torch.float16)
    for x in (wide[..., 3:1027], wide[:, :2, :1024], wide[:1, :1, 7:1031]):
        exact = x.double() @ weight.dequantize().double().T
        torch.testing.assert_close(ops.linear(x, weight).double(), exact, rtol=2**-9, atol=2**-9)


def test_a_batch_invariant_token_has_the_same_bits_in_every_batch() -> None:
    weight = weight_of(scheme("int4", 128), 768, 1024, torch.float16)
    x = rows(40, 1024, dtype=torch.float16)
    ops.set_batch_invariant(True)
    try:
        whole = ops.linear(x, weight)
        for n in (1, 4, 5, 33):
            assert torch.equal(ops.linear(x[:n], weight), whole[:n])
    finally:
        ops.set_batch_invariant(False)


def test_not_finite_activations_stay_so_and_meet_no_other_token() -> None:
    weight = weight_of(scheme("int4", 128), 256, 512, torch.float16)
    x = rows(12, 512, dtype=torch.float16)
    x[3, 100] = torch.nan
    x[7, 5] = torch.inf
    y = ops.linear(x, weight)
    broken = ~y.isfinite().all(dim=1)
    assert broken.nonzero().flatten().tolist() == [3, 7] and bool(y[3].isnan().all())


@pytest.mark.parametrize(("name", "activations"), [("int4", Activations.E4M3), ("int4", Activations.INT8)])
def test_quantised_activations_meet_codes_and_outliers_meet_them_as_they_come(
    name: str, activations: Activations
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("8-bit activations take compute capability 9.0")
    of = scheme(name, 128, 1)
    layer = PackedLinear.from_packed(weight_of(of, 512, 1024, torch.float16).to_layout("stream")).cuda()
    x = rows(20, 1024, dtype=torch.float16)
    expected = layer(x).float()
    layer.multiply_with(activations)
    found = layer(x).float()
    assert float((found - expected).norm() / expected.norm()) < 0.05
    assert not torch.equal(found, expected)


def test_a_layer_runs_in_a_graph_and_its_state_is_that_of_the_cpu() -> None:
    of = scheme("uint4", 128, 1)
    plain = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = PackedWeight.from_encoded(encode(plain, of))
    layer = PackedLinear.from_packed(packed).cuda().half()
    x = rows(6, 1024, dtype=torch.float16)
    expected = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    assert torch.equal(y, expected)
    state = layer.state_dict()
    assert torch.equal(state["weight_outliers"].cpu(), packed.outliers)  # type: ignore[arg-type]
    assert torch.equal(state["weight_packed"].cpu(), packed.data)


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_a_gpu_keeps_the_weights_that_a_cpu_does(recipe: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(96, 256, generator=generator).bfloat16(), torch.randn(1024, 256, generator=generator)
    statistics = {"hessian": x.T @ x / 1024}
    here = encode(weight, scheme("int4", 64, 2), recipe, statistics)
    there = encode(weight.cuda(), scheme("int4", 64, 2), recipe, {k: v.cuda() for k, v in statistics.items()})
    assert here.outliers is not None and there.outliers is not None
    same = (here.outliers == there.outliers.cpu()).double().mean()
    assert float(same) == 1.0 if recipe == "rtn" else float(same) > 0.98


def test_gradients_and_traces_take_the_kernels_of_the_dense_part() -> None:
    layer = PackedLinear.from_packed(weight_of(scheme("int4", 128, 1), 512, 1024, torch.float16))
    x = rows(8, 1024, dtype=torch.float16).requires_grad_()
    expected = layer(x.detach())
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=2**-8)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    torch.testing.assert_close(grad.float(), layer.weight.float().sum(0).expand_as(x), rtol=2**-7, atol=2**-5)
    traced = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x.detach()), expected, rtol=2**-8, atol=2**-8)
