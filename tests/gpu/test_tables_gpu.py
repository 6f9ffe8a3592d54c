"""Tables of rows on a GPU: the bits of every code, products within tolerance by both schedules, gates and outliers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tersor import formats, hardware, ops
from tersor.compress import encode
from tersor.formats import Encoded, Outliers, Scheme, get_scheme
from tersor.kernels import dense as family
from tersor.kernels import jit
from tersor.layouts import PackedWeight
from tersor.layouts.packing import Packing
from tersor.nn import PackedLinear
from tersor.ops import Gate, dispatch, prepared

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENS = (1, 3, 8, 13, 16, 31, 33, 64, 65, 100, 130, 200, 300, 1000)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Leave no prepared call behind that a test made as if the GPU were another."""
    prepared.forget()
    yield
    prepared.forget()


def scheme(dtype: str, percent: float = 0.0) -> Scheme:
    """Return the scheme for activations of a dtype, with outliers where a share is given."""
    return replace(get_scheme("lut3", None, dtype), outliers=Outliers(percent, "bfloat16") if percent else None)


def weight_of(of: Scheme, oc: int, ic: int, seed: int = 0) -> PackedWeight:
    """Return a weight of random codes and tables on the GPU, in its kernel layout."""
    generator = torch.Generator().manual_seed(seed)
    if of.outliers is not None:
        plain = torch.randn(oc, ic, generator=generator) / ic**0.5
        packed = PackedWeight.from_encoded(encode(plain.cuda(), of))
    else:
        codes = torch.randint(0, 8, (oc, ic), dtype=torch.uint8, generator=generator)
        table = torch.randn(oc, 8, generator=generator).sort(dim=1).values.to(DTYPES[of.scale_dtype])
        packed = PackedWeight.from_encoded(Encoded(of, codes.cuda(), table.cuda(), None, 0.0, 0.0))
    return packed.to_layout(ops.preferred_layout(of, DTYPES[of.scale_dtype], torch.device("cuda")))


def rows(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Return random activations on the GPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def check(y: torch.Tensor, x: torch.Tensor, decoded: torch.Tensor, added: torch.Tensor | None = None) -> None:
    """Hold a product, with what was added to it, within one rounding of the exact one."""
    exact = x.double() @ decoded.T
    allowed = formats.product_tolerance(x.double(), decoded, y.dtype)
    if added is not None:
        exact, allowed = exact + added.double(), allowed + added.double().abs() * torch.finfo(y.dtype).eps
    worst = float(((y.double() - exact).abs() / allowed).max())
    assert worst <= 1, f"{len(x)} tokens: the error is {worst:.2f} of what is allowed"


@pytest.mark.parametrize("name", DTYPES)
def test_a_table_is_decoded_to_its_very_bits(name: str) -> None:
    oc, ic, device = 200, 640, torch.device("cuda", 0)
    of = scheme(name)
    packed, packing = weight_of(of, oc, ic), Packing.of(of, name)
    scratch = torch.full((oc, ic), torch.nan, dtype=DTYPES[name], device=device)
    family.launch_dequantize(
        jit.get(family.dequantize_source(packing), device),
        torch.cuda.current_stream(device).cuda_stream,
        weight=packed.data.data_ptr(),
        scale=packed.scale.data_ptr(),
        scratch=scratch.data_ptr(),
        first_block=0,
        oc=oc,
        ic=ic,
        factor=packing.factor,
    )
    assert torch.equal(scratch.view(torch.int16), packed.dequantize(DTYPES[name]).view(torch.int16))


@pytest.mark.parametrize("schedule", ["sm80", "sm90"])
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("oc", "ic"), [(320, 1024), (1000, 640), (65, 1096), (4096, 4096)])
def test_products_are_within_tolerance(
    oc: int, ic: int, name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip, dtype = hardware.of_device(0), DTYPES[name]
    if schedule == "sm90" and chip.capability != (9, 0):
        pytest.skip("needs compute capability 9.0")
    if schedule == "sm80":
        monkeypatch.setattr(hardware, "of_device", lambda index: replace(chip, capability=(8, 0)))
    weight = weight_of(scheme(name), oc, ic)
    decoded = weight.dequantize().double()
    for n in TOKENS:
        x, bias, residual = rows(n, ic, dtype=dtype), rows(oc, dtype=dtype, seed=2), rows(n, oc, dtype=dtype, seed=3)
        decision = dispatch.decide(weight.scheme, weight.layout, (oc, ic), n, dtype, x.device)
        assert decision.kernel != dispatch.REFERENCE, decision.why
        check(ops.linear(x, weight), x, decoded)
        check(ops.linear(x, weight, bias), x, decoded, bias.expand(n, -1))
        y = ops.linear(x, weight, residual=residual)
        check(y, x, decoded, residual)
        assert torch.equal(y, ops.linear(x, weight, residual=residual))


def test_tables_of_another_dtype_are_multiplied_by_the_reference_and_that_is_said() -> None:
    of = scheme("bfloat16")
    reason = ops.explain(of, 512, 512, 8, torch.float16)
    assert reason.kernel == dispatch.REFERENCE and "tables of bfloat16 meet bfloat16 activations" in reason.why
    weight = weight_of(of, 128, 256).to_layout("stream")
    x = rows(8, 256, dtype=torch.float16)
    check(ops.linear(x, weight), x, weight.dequantize().double())


@pytest.mark.parametrize("gate", [Gate.SILU, Gate.GELU_TANH])
def test_gate_and_up_of_tables_become_one(gate: Gate) -> None:
    of = scheme("bfloat16")
    plain = [weight_of(of, 768, 1024, seed).to_layout("stream") for seed in (4, 5)]
    weight = PackedWeight.gate_up(*plain)
    weight = weight.to_layout(ops.preferred_layout(of, torch.bfloat16, torch.device("cuda")))
    for n in (1, 7, 40, 64, 200):
        x = rows(n, 1024, dtype=torch.bfloat16) / 32
        expected = gate.combine(*(x.float() @ part.dequantize().T for part in plain))
        found = ops.gated_linear(x, weight, gate=gate)
        torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6)


def test_a_batch_invariant_token_has_the_same_bits_in_every_batch() -> None:
    weight = weight_of(scheme("float16"), 768, 1024)
    x = rows(40, 1024, dtype=torch.float16)
    ops.set_batch_invariant(True)
    try:
        whole = ops.linear(x, weight)
        for n in (1, 4, 5, 33):
            assert torch.equal(ops.linear(x[:n], weight), whole[:n])
    finally:
        ops.set_batch_invariant(False)


@pytest.mark.parametrize("name", DTYPES)
def test_outliers_stand_beside_tables(name: str) -> None:
    weight, dtype = weight_of(scheme(name, 0.5), 1536, 2048), DTYPES[name]
    decoded = weight.dequantize().double()
    for n in (1, 4, 13, 48, 200):
        x = rows(n, 2048, dtype=dtype)
        exact = x.double() @ decoded.T
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ops.linear(x, weight).double(), exact, rtol=2 * eps, atol=2 * eps)


def test_a_layer_runs_in_a_graph_and_its_state_is_that_of_the_cpu() -> None:
    plain = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).half()
    packed = PackedWeight.from_encoded(encode(plain, scheme("float16")))
    layer = PackedLinear.from_packed(packed).cuda().half()
    x = rows(6, 1024, dtype=torch.float16)
    expected = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    assert torch.equal(y, expected)
    state = layer.state_dict()
    assert torch.equal(state["weight_scale"].cpu(), packed.scale)
    assert torch.equal(state["weight_packed"].cpu(), packed.data)


def test_gradients_go_back_through_tables() -> None:
    layer = PackedLinear.from_packed(weight_of(scheme("float16"), 512, 1024).to_layout("stream")).cuda().half()
    x = rows(8, 1024, dtype=torch.float16).requires_grad_()
    (grad,) = torch.autograd.grad((layer(x) / 64).float().sum(), x)
    expected = (layer.weight.float().sum(0) / 64).expand_as(x)
    torch.testing.assert_close(grad.float(), expected, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_a_gpu_finds_the_tables_that_a_cpu_does(recipe: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(96, 256, generator=generator), torch.randn(1024, 256, generator=generator)
    statistics = {"hessian": x.T @ x / 1024}
    here = encode(weight, scheme("bfloat16"), recipe, statistics)
    there = encode(weight.cuda(), scheme("bfloat16"), recipe, {k: v.cuda() for k, v in statistics.items()})
    same = (here.codes == there.codes.cpu()).double().mean()
    assert float(same) > (0.999 if recipe == "rtn" else 0.9)
    assert there.squared_error == pytest.approx(here.squared_error, rel=1e-3 if recipe == "rtn" else 0.02)
