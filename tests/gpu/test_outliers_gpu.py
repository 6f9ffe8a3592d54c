"""Outliers on a GPU: products within tolerance by every kernel, wherever they stand, in graphs and as layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.allowance import within

from tersor import formats, hardware, ops
from tersor.compress import encode
from tersor.formats import Activations, Outliers, Scheme, get_scheme
from tersor.kernels import tune
from tersor.kernels.tune import beside
from tersor.layouts import STREAM, PackedWeight, stream
from tersor.layouts.outliers import rounds_of
from tersor.nn import PackedLinear
from tersor.ops import Gate, dense, dequantized, mode, outlier_sums, outliers, prepared

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


def allowance(
    exact: torch.Tensor, x: torch.Tensor, decoded: torch.Tensor, dtype: torch.dtype, ahead: torch.Tensor | None
) -> torch.Tensor:
    """Return what a product may err by whose sums are float32 and rounded once to a dtype.

    `ahead`: exact numbers that another kernel summed up and rounded before the product was added, which may be far
    greater than what comes of them; `None`: nothing.
    """
    allowed = formats.product_tolerance(x.double(), decoded, torch.float32)
    info = torch.finfo(dtype)
    for rounded in (exact, ahead):
        if rounded is not None:
            allowed = allowed + (rounded.abs() + allowed) * info.eps / 2 * 1.001 + info.smallest_normal * info.eps
    return allowed


def check(
    y: torch.Tensor,
    exact: torch.Tensor,
    x: torch.Tensor,
    decoded: torch.Tensor,
    ahead: torch.Tensor | None,
    what: str = "",
) -> None:
    """Hold a product against its exact numbers; arguments as for `allowance`, and `what` stands in the message."""
    shape = f"{len(x)} tokens, weight {tuple(decoded.shape)}, {y.dtype} {what}"
    within(y, exact, allowance(exact, x, decoded, y.dtype, ahead), shape)


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


PROMPTS = (65, 128, 300, 512, 1031)
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)


def rounded(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight as it is decoded for cuBLAS, in float64: each number rounded once."""
    return weight.dequantize().to(dtype).double()


def gathered(x: torch.Tensor, weight: PackedWeight, *of: torch.Tensor | None) -> torch.Tensor:
    """Return the product whose outliers the fused kernel gathers, whatever the number of tokens."""
    kept, (oc, ic) = weight.scheme.outliers, weight.shape
    assert kept is not None
    problem = tune.LinearProblem.of(weight.dense.packing, (oc, ic), x.numel() // ic)
    config = tune.choose_beside(problem, rounds_of(kept, ic), hardware.of_device(0))
    bias, residual = of
    with mode.using(config=config):
        return ops.linear(x, weight, bias, residual=residual)


@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "group_size"), [*SCHEMES, ("lut3", None)])
def test_both_ways_of_prompts_are_within_tolerance(name: str, group_size: int | None, dtype: torch.dtype) -> None:
    of = scheme(name, group_size, 1, "bfloat16" if dtype == torch.bfloat16 else "float16")
    if of.has_table:
        of = replace(of, scale_dtype=str(dtype).removeprefix("torch."))
    for oc, ic in ((1000, 640), (2048, 1024)):
        weight = weight_of(of, oc, ic, dtype)
        if weight.arranged is None:
            pytest.fail("outliers of the activations' dtype are arranged for kernels")
        own, exactly, once = weight.dense, weight.dequantize().double(), rounded(weight, dtype)
        for n in PROMPTS:
            x, bias, residual = (
                rows(n, ic, dtype=dtype),
                rows(oc, dtype=dtype, seed=2),
                rows(n, oc, dtype=dtype, seed=3),
            )
            cancelling = (-(x.double() @ once.T)).to(dtype)  # a product that was rounded first would be far off
            for has in ((None, None), (bias, None), (None, residual), (None, cancelling), (bias, residual)):
                beside = sum(one.double() for one in has if one is not None)
                what = f"with bias {has[0] is not None}, residual {has[1] is not None}"
                check(gathered(x, weight, *has), x.double() @ exactly.T + beside, x, exactly, None, f"gathered {what}")
                found = outlier_sums.decoded(x, weight, own, *has)
                check(found, x.double() @ once.T + beside, x, once, None, f"decoded {what}")


@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "group_size", "percent", "ic"),
    [("int4", 128, 2, 1152), ("fp6_e2m3", None, 10, 1160), ("uint3", 64, 0.1, 1088), ("uint4", 32, 1, 992)],
)
def test_a_decoded_weight_has_its_numbers_rounded_once_and_outliers_exactly(
    name: str, group_size: int | None, percent: float, ic: int, dtype: torch.dtype
) -> None:
    """Rows end within a unit and, but for groups of a block, channels within a block."""
    weight = weight_of(scheme(name, group_size, percent, str(dtype).removeprefix("torch.")), 709, ic, dtype)
    assert weight.arranged is not None
    parts = [part.clone() for _, part in dequantized.with_outliers(weight, prepared.type_of(weight.dense))]
    found, wanted = torch.cat(parts).double(), rounded(weight, dtype)
    assert torch.equal(found, wanted), f"{int((found != wanted).sum())} of {found.numel()} numbers differ"


@needs_hopper
def test_prompts_are_decoded_in_slices_and_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "SCRATCH_BYTES", 1 << 20)
    monkeypatch.setattr(tune, "decodes_beside", lambda problem, rounds, chip: problem.n > 64)
    ops.prepared.forget()
    weight, x = (
        weight_of(scheme("int4", 128, 0.5), 4096, 1024, torch.bfloat16),
        rows(2, 300, 1024, dtype=torch.bfloat16),
    )
    once = rounded(weight, torch.bfloat16)
    expected = ops.linear(x, weight)
    check(expected.view(600, 4096), x.view(600, 1024).double() @ once.T, x.view(600, 1024), once, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(x, weight)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    ops.prepared.forget()


@needs_hopper
def test_a_prompt_of_a_large_weight_is_decoded_and_meets_what_is_gathered(launched: list[str]) -> None:
    weight = weight_of(scheme("fp6_e2m3", None, 0.5, "float16"), 4096, 4096, torch.float16)
    x, once = rows(2048, 4096, dtype=torch.float16), rounded(weight, torch.float16)
    launched.clear()
    y = ops.linear(x, weight)
    assert launched == ["tersor_dequantize_fp6_e2m3_float16_beside1"]
    check(y, x.double() @ once.T, x, once, None)
    traced = outliers.operator(
        x, weight.data, weight.scale, None, weight.outliers, weight.arranged, None, weight.scheme.key(), 4096, 4096,
        weight.layout,
    )  # fmt: skip
    assert launched[1:] == launched[:1] and torch.equal(traced, y)
    launched.clear()
    found = gathered(x, weight, None, None)
    assert len(launched) == 1 and "tersor_linear_sm90" in launched[0]
    decoded = weight.dequantize().double()
    check(found, x.double() @ decoded.T, x, decoded, None)


SLOPE = 1.13
"""More than the slope of silu and of the approximate gelu is anywhere: 1.100 and 1.129."""


def gated_allowance(
    gate: Gate, sums: list[torch.Tensor], errors: list[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Return what a gate of two exact sums may err by, where these err by `errors`, by operators of torch.

    An activation in float32 errs by some units in its last place, of numbers that nearly cancel too; it is rounded, and
    so is the product.
    """
    active, info = gate.combine(sums[0], torch.ones_like(sums[0])).abs(), torch.finfo(dtype)
    reached = sums[1].abs() + errors[1]
    allowed = (SLOPE * errors[0] + 2.0**-20 * sums[0].abs()) * reached + active * errors[1]
    wide = (active + SLOPE * errors[0]) * reached
    return allowed + wide * info.eps * 1.01 + info.smallest_normal


@pytest.mark.parametrize("gate", [Gate.SILU, Gate.GELU_TANH])
def test_a_gate_comes_after_the_outliers(gate: Gate, launched: list[str]) -> None:
    """It takes sums that are rounded; a decoded weight is rounded ahead of these, and 0.003 may be 0.011 by that."""
    of, dtype = scheme("fp6_e2m3", None, 1), torch.bfloat16
    plain = [PackedWeight.from_encoded(encode(rows(768, 1024, dtype=dtype, seed=s) / 32, of)) for s in (4, 5)]
    weight = PackedWeight.gate_up(*plain)
    weight = weight.to_layout(ops.preferred_layout(of, dtype, torch.device("cuda")))
    for n in (1, 7, 40, 64, 200, 2048):
        x = rows(n, 1024, dtype=dtype)
        launched.clear()
        found = ops.gated_linear(x, weight, gate=gate)
        decodes, apart = (any(kernel in name for name in launched) for kernel in ("_dequantize_", "_outlier_sums_"))
        parts = [rounded(part, dtype) if decodes else part.dequantize().double() for part in plain]
        sums = [x.double() @ part.T for part in parts]
        errors = [
            allowance(exact, x, part, dtype, added(x, own) if apart else None)
            for exact, part, own in zip(sums, parts, plain, strict=True)
        ]
        way = "decoded" if decodes else "summed up ahead" if apart else "gathered"
        within(found, gate.combine(*sums), gated_allowance(gate, sums, errors, dtype), f"{n} tokens, {way}")


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
