"""Pruned weights on a GPU: the bytes of the CPU, products within tolerance, in a graph and as a layer too."""

from __future__ import annotations

import pytest
import torch
from helpers import pruned
from helpers.allowance import within

from tersor import formats, ops
from tersor.checkpoint.pack import pack_sparse
from tersor.formats import Plain, Pruned, Scheme, Sparse, get_scheme
from tersor.layouts import SparseWeight
from tersor.nn import SparseLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float16, torch.bfloat16)
CUDA = torch.device("cuda")


def made(
    oc: int, ic: int, density: float, values: Scheme | Plain, dtype: torch.dtype
) -> tuple[SparseWeight, torch.Tensor]:
    """Return a pruned weight on the GPU, and what it decodes to, rounded to the dtype of activations, in float64."""
    weight, decoded = pruned.sparse(pruned.random(oc, ic), pruned.kept(oc, ic, density), values)
    return weight.to(CUDA), decoded.to(dtype).double().cuda()


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return random activations on the GPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def check(y: torch.Tensor, exact: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Hold a product, with what was added before it was rounded once, against its exact numbers."""
    allowed = formats.product_tolerance(x.double(), weight, torch.float32)
    info = torch.finfo(y.dtype)
    allowed = allowed + (exact.abs() + allowed) * info.eps / 2 * 1.001 + info.smallest_normal * info.eps
    within(y, exact, allowed, f"{len(x)} tokens")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", pruned.VALUES, ids=lambda values: values.key())
@pytest.mark.parametrize("density", pruned.DENSITIES)
def test_products_are_within_tolerance(dtype: torch.dtype, values: Scheme | Plain, density: float) -> None:
    weight, decoded = made(301, 416, density, values, dtype)
    for tokens in (1, 16, 65):
        x, bias, residual = (
            rows(tokens, 416, dtype=dtype),
            rows(301, dtype=dtype),
            rows(tokens, 301, dtype=dtype, seed=1),
        )
        check(ops.linear(x, weight), x.double() @ decoded.T, x, decoded)
        exact = x.double() @ decoded.T + bias.double() + residual.double()
        check(ops.linear(x, weight, bias, residual=residual), exact, x, decoded)


@pytest.mark.parametrize("values", pruned.VALUES, ids=lambda values: values.key())
@pytest.mark.parametrize("density", pruned.DENSITIES)
def test_a_gpu_packs_the_bytes_of_a_cpu(values: Scheme | Plain, density: float) -> None:
    weight = (pruned.random(77, 224) * pruned.kept(77, 224, density)).to(
        getattr(torch, values.dtype) if isinstance(values, Plain) else torch.bfloat16
    )
    form = Pruned.of(Sparse(values), (weight != 0).sum(1))
    on_cpu, on_gpu = pack_sparse(weight, form), pack_sparse(weight.cuda(), form)
    assert on_cpu.tensors.keys() == on_gpu.tensors.keys()
    assert all(torch.equal(on_gpu.tensors[name].cpu(), tensor) for name, tensor in on_cpu.tensors.items())


def test_what_is_not_finite_reaches_every_output() -> None:
    weight, decoded = made(128, 256, 0.5, get_scheme("fp6"), torch.float16)
    x = rows(4, 256, dtype=torch.float16)
    x[2, 3] = float("inf")
    found, wanted = ops.linear(x, weight), x.double() @ decoded.T
    assert torch.equal(found.isnan(), wanted.isnan()) and found[[0, 1, 3]].isfinite().all()


def test_a_product_is_captured_in_a_graph() -> None:
    weight, _ = made(200, 512, 0.4, get_scheme("fp6"), torch.bfloat16)
    layer, x = SparseLinear.from_packed(weight, dtype=torch.bfloat16), rows(3, 512, dtype=torch.bfloat16)
    layer.prepare(torch.bfloat16)
    with torch.inference_mode():
        wanted = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.mul_(2)
        graph.replay()
    assert torch.equal(y, wanted * 2)
