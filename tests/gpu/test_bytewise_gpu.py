"""8-bit activations on the tensor cores, whatever their codes are: tokens, graphs, and calls upon each other."""

from __future__ import annotations

import math

import pytest
import torch

from tersor import formats, nn, ops
from tersor.compress import quantize_rtn
from tersor.integrations.transformers import replace
from tersor.layouts import STREAM, PackedWeight

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)

KINDS = [("fp8", "fp6_e3m2"), ("int8", "int4"), ("int8:g128", "int4")]
"""(Activations, a format that they meet)."""


def stored(name: str, oc: int, ic: int) -> PackedWeight:
    """A random weight as it is stored."""
    torch.manual_seed(oc + ic)
    return PackedWeight.from_encoded(quantize_rtn(torch.randn(oc, ic, device="cuda"), formats.get_scheme(name)))


def packed(kind: str, name: str, oc: int, ic: int) -> PackedWeight:
    """The same in the layout for such activations."""
    weight = stored(name, oc, ic)
    layout = ops.preferred_layout(weight.scheme, torch.float16, torch.device("cuda"), kind)
    assert layout != STREAM
    return weight.to_layout(layout)


@pytest.mark.parametrize(("kind", "name"), KINDS)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_token(bad: float, kind: str, name: str) -> None:
    x = torch.randn(20, 512, device="cuda").half()
    x[3, 100] = bad
    y = ops.linear(x, packed(kind, name, 128, 512))
    assert y[3].isnan().all()
    y[3] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_a_model_and_a_cuda_graph(kind: str, name: str) -> None:
    layer = nn.PackedLinear.from_packed(stored(name, 256, 256))
    replace.multiply_with(layer, kind)
    x = torch.randn(5, 256, device="cuda").half()
    assert torch.equal(layer(x), ops.linear(x, packed(kind, name, 256, 256)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(layer(x))
    again = torch.randn(5, 256, device="cuda").half()
    x.copy_(again)
    graph.replay()
    assert torch.equal(y, layer(layer(again)))


@pytest.mark.parametrize(("kind", "name"), KINDS)
@pytest.mark.parametrize("n", [5, 100, 300])
def test_calls_upon_each_other_have_their_own_scales(n: int, kind: str, name: str) -> None:
    """Scales lie where those of the call before lay, and kernels start before the ones ahead have ended."""
    weight = packed(kind, name, 8448, 256)
    sources = [torch.randn(n, 256, device="cuda").half() * 2.0**power for power in range(-6, 6)]
    expected = []
    for x in sources:
        torch.cuda.synchronize()
        expected.append(ops.linear(x, weight))
        with ops.using(reference=True):
            reference = ops.linear(x, weight).float()
        assert float((expected[-1].float() - reference).norm()) < 5e-3 * float(reference.norm())
    for _ in range(20):
        found = [ops.linear(x, weight) for x in sources]
        assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(sources)
