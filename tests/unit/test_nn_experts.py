"""The weights of a layer's experts in one module: stored in the model's order, multiplied as kernels read them."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from tersor import ops
from tersor.checkpoint.names import DENSE, PACKED
from tersor.compress import encode
from tersor.errors import UnsupportedError
from tersor.formats import get_scheme
from tersor.layouts import PackedWeight, StackedWeight
from tersor.nn import PackedStack, Rows, bits_per_weight
from tersor.nn.experts import multiply_stacks, one_by_one

EXPERTS, HIDDEN, INNER, TOKENS = 3, 64, 12, 5


def stack(oc: int, ic: int, name: str, rows: Rows = Rows.PLAIN, seed: int = 0) -> PackedStack:
    """Packed weights [E, oc, ic] of random numbers."""
    scheme, generator = get_scheme(name), torch.Generator().manual_seed(seed)
    weights = []
    for _ in range(EXPERTS):
        encoded = encode(torch.randn(oc, ic, generator=generator), scheme)
        tensors = {"scale": encoded.scale, "zero_point": encoded.zero_point}
        weights.append(PackedWeight(scheme, (oc, ic), DENSE.pack(encoded)[PACKED], **tensors))
    held = StackedWeight.stack(weights)
    module = PackedStack((EXPERTS, oc, ic), scheme, rows, dtype=torch.float32)
    state = {"weight_packed": held.data, "weight_scale": held.scale}
    module.load_state_dict(state if held.zero_point is None else {**state, "weight_zero_point": held.zero_point})
    return module


def routed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [T, H], two experts of each, of which one is none, and factors."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(TOKENS)])
    index[2, 0] = EXPERTS
    return torch.randn(TOKENS, HIDDEN, generator=generator), index, torch.rand(TOKENS, 2, generator=generator)


@pytest.mark.parametrize("rows", Rows)
@pytest.mark.parametrize(("name", "layout"), [("fp6_e3m2", "stream"), ("uint4", "stream"), ("uint4", "tiles_float16")])
def test_rows_lie_in_the_models_order_wherever_anyone_looks(
    rows: Rows, name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    module = stack(2 * INNER, HIDDEN, name, rows)
    before, decoded = copy.deepcopy(module.state_dict()), module.weight
    weight = module.ready(torch.float32)
    assert weight.shape[1] == (2 * INNER if rows is Rows.PLAIN else 28)
    assert module.as_stored is False and module.ready(torch.float32) is weight and module.layout == layout
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(module.weight, decoded)
    module.half().load_state_dict(before)
    assert module.as_stored and module.dtype == torch.float16 and module.layout == "stream"
    assert torch.equal(module.weight, decoded.half())
    stored = sum(tensor.nbytes for tensor in before.values())
    assert bits_per_weight(module) == pytest.approx(8 * stored / decoded.numel(), rel=0.01)
    assert "experts=3, in_features=64, out_features=24" in repr(module)
    with pytest.raises(UnsupportedError, match="by the layer that holds them"):
        module(torch.randn(1, HIDDEN))


@pytest.mark.timeout(30)
def test_threads_that_are_the_first_to_ask_arrange_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stack(2 * INNER, HIDDEN, "uint4", Rows.HALVES)
    decoded, both, first, found = module.weight, threading.Event(), threading.Event(), []
    calls: list[int] = []

    def layout(*_: object) -> str:
        calls.append(1)
        if len(calls) == 1:
            both.wait(0.3)  # for the other thread, where it comes so far
        else:
            both.set()
            first.wait(0.3)
        return "tiles_float16"

    def ask() -> None:
        found.append(module.ready(torch.float32))
        first.set()

    monkeypatch.setattr(ops, "preferred_layout", layout)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(module.weight, decoded)
    assert all(torch.equal(one.data, module.weight_packed) for one in found)


@pytest.mark.parametrize("rows", [Rows.HALVES, Rows.PAIRS])
@pytest.mark.parametrize("gate", [ops.Gate.SILU, ops.Gate.CLAMPED])
def test_experts_with_biases_give_the_sum_of_their_outputs_and_its_gradient(rows: Rows, gate: ops.Gate) -> None:
    first, second = stack(2 * INNER, HIDDEN, "int8", rows), stack(HIDDEN, INNER, "int4", seed=1)
    x, index, factors = routed()
    generator = torch.Generator().manual_seed(2)
    biases = [torch.randn(EXPERTS, width, generator=generator) for width in (2 * INNER, HIDDEN)]
    inner, outer, x_plain, x_packed = (
        first.weight,
        second.weight,
        x.clone().requires_grad_(),
        x.clone().requires_grad_(),
    )

    def plain(expert: int, tokens: torch.Tensor) -> torch.Tensor:
        both = (tokens @ inner[expert].T + biases[0][expert])[None]
        gated = gate.combine(*(half[0].T for half in rows.halves(both.transpose(1, 2))))
        return gated @ outer[expert].T + biases[1][expert]

    expected = one_by_one(x_plain, index, factors, EXPERTS, plain)
    arranged = rows.arrange_bias(biases[0])
    with torch.no_grad():
        got = multiply_stacks(x, first, second, index, factors, gate, arranged, biases[1])
    torch.testing.assert_close(got, expected.detach())
    with_gradient = multiply_stacks(x_packed, first, second, index, factors, gate, arranged, biases[1])
    torch.testing.assert_close(with_gradient, expected)
    for y in (expected, with_gradient):
        y.square().sum().backward()
    torch.testing.assert_close(x_packed.grad, x_plain.grad, rtol=1e-3, atol=1e-2)


def test_8_bit_activations_are_quantised_before_both_products() -> None:
    first, second = stack(2 * INNER, HIDDEN, "fp6_e3m2", Rows.HALVES), stack(HIDDEN, INNER, "fp6_e3m2", seed=1)
    x, index, factors = routed()
    exact = multiply_stacks(x, first, second, index, factors, ops.Gate.SILU)
    for module in (first, second):
        module.multiply_with("fp8")
    rounded = multiply_stacks(x, first, second, index, factors, ops.Gate.SILU)
    assert 0.001 < float((rounded - exact).norm() / exact.norm()) < 0.1
    with pytest.raises(UnsupportedError, match="activations fp8"):
        stack(HIDDEN, INNER, "uint8").multiply_with("fp8")
