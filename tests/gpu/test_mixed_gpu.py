"""Mixed weights on a GPU: products within the tolerance of a float32 accumulation, in a graph and as a layer too."""

from __future__ import annotations

import pytest
import torch
from helpers.mixes import IC, levels, matrix, mixed

from tersor import formats, ops
from tersor.formats import Assignment
from tersor.layouts import MixedWeight
from tersor.nn import MixedLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

OC = 300
DTYPES = (torch.float16, torch.bfloat16)


def ready(weight: MixedWeight, dtype: torch.dtype) -> MixedWeight:
    """Return a weight on the GPU, every row set in the layout for activations of a dtype."""
    device = torch.device("cuda")
    return weight.to(device).to_layout(lambda scheme: ops.preferred_layout(scheme, dtype, device))


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return random activations on the GPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def check(y: torch.Tensor, exact: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Hold a product, with what was added before it was rounded once, against its exact numbers."""
    allowed = formats.product_tolerance(x.double(), weight, torch.float32)
    info = torch.finfo(y.dtype)
    allowed = allowed + (exact.abs() + allowed) * info.eps / 2 * 1.001 + info.smallest_normal * info.eps
    assert bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ordered", [False, True])
def test_products_are_within_tolerance(dtype: torch.dtype, ordered: bool) -> None:
    form = levels(OC)
    form = Assignment(form.mix, bytes(sorted(form.level))) if ordered else form
    plain = mixed(matrix(OC), form)
    weight, decoded = ready(plain, dtype), plain.dequantize().double().cuda()
    for tokens in (1, 5, 16, 33, 64, 300):
        x, bias, residual = rows(tokens, IC, dtype=dtype), rows(OC, dtype=dtype), rows(tokens, OC, dtype=dtype, seed=1)
        check(ops.linear(x, weight), x.double() @ decoded.T, x, decoded)
        exact = x.double() @ decoded.T + bias.double() + residual.double()
        check(ops.linear(x, weight, bias, residual=residual), exact, x, decoded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_and_up_are_one_launch_a_row_set(dtype: torch.dtype) -> None:
    form = levels(200, 5)
    gate, up = (mixed(matrix(200, seed), form) for seed in (1, 2))
    both = ready(MixedWeight.gate_up(gate, up), dtype)
    for tokens in (1, 33, 200):
        x = rows(tokens, IC, dtype=dtype)
        wide = x.double().cpu()
        wanted = torch.nn.functional.silu(wide @ gate.dequantize().double().T) * (wide @ up.dequantize().double().T)
        close = 2e-2 if dtype is torch.bfloat16 else 3e-3
        torch.testing.assert_close(ops.gated_linear(x, both).double().cpu(), wanted, rtol=close, atol=close * 10)


def test_a_layer_moves_saves_and_is_captured() -> None:
    plain = mixed(matrix(OC), levels(OC))
    layer = MixedLinear.from_packed(plain, dtype=torch.float16)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer = layer.cuda()
    x = rows(4, IC, dtype=torch.float16)
    wanted = layer(x)
    assert {one.layout for one in layer.packed_weight().sets} == {"tiles_float16"}
    again = layer.state_dict()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name].cpu(), tensor) for name, tensor in stored.items())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, wanted)
