"""A product with a mixed weight is, feature by feature, that of the row set of its level: bit for bit."""

from __future__ import annotations

import pytest
import torch
from helpers.mixes import IC, levels, matrix, mixed

from tersor import ops
from tersor.errors import ShapeError
from tersor.formats import Assignment
from tersor.layouts import MixedWeight
from tersor.layouts.gated import interleave
from tersor.ops import Gate, row_sets


def rows(*shape: int, seed: int = 9) -> torch.Tensor:
    """Return random activations."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sorted_", [False, True])
def test_a_product_is_rounded_once_with_bias_and_residual(dtype: torch.dtype, sorted_: bool) -> None:
    assignment = levels(75)
    if sorted_:
        assignment = Assignment(assignment.mix, bytes(sorted(assignment.level)))
    weight = mixed(matrix(75), assignment)
    x, bias, residual = rows(2, 5, IC).to(dtype), rows(75).to(dtype), rows(2, 5, 75, seed=3).to(dtype)
    y = ops.linear(x, weight, bias, residual=residual)
    wide = x.float() @ weight.dequantize().T + bias.float() + residual.float()
    assert y.is_contiguous() and y.dtype == dtype
    if dtype is torch.float32:
        torch.testing.assert_close(y, wide)
    else:
        assert (y != wide.to(dtype)).float().mean() < 0.01  # sums in another order may round to the neighbour
    for place, one in enumerate(weight.sets):
        features = [i for i, level in enumerate(assignment.level) if assignment.mix.levels[level] == one.scheme]
        alone = ops.linear(x, weight.sets[place], bias[features], residual=residual[..., features])
        assert torch.equal(y[..., features], alone)


@pytest.mark.parametrize("channels", [48, 43])
def test_gate_and_up_become_one_number_a_channel(channels: int) -> None:
    assignment = levels(channels, 5)
    gate, up = (mixed(matrix(channels, seed), assignment) for seed in (1, 2))
    both, x = MixedWeight.gate_up(gate, up), rows(6, IC)
    halves = rows(channels), rows(channels, seed=4)
    residual = rows(6, channels, seed=5)
    y = ops.gated_linear(x, both, interleave(*halves), residual=residual)
    wanted = Gate.SILU.combine(ops.linear(x, gate, halves[0]), ops.linear(x, up, halves[1])) + residual
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    together = ops.linear(x, both, interleave(*halves))
    torch.testing.assert_close(
        Gate.GELU.of_rows(together), ops.gated_linear(x, both, interleave(*halves), gate=Gate.GELU)
    )


def test_gradients_and_traces_go_through() -> None:
    weight = mixed(matrix(20), levels(20))
    x = rows(3, IC).requires_grad_()
    ops.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, -1))
    meta = ops.linear(torch.empty(0, IC), weight)
    assert meta.shape == (0, 20)


def test_a_traced_product_is_one_operator_for_any_number_of_tokens() -> None:
    weight, bias = mixed(matrix(20), levels(20)), rows(20)
    operators: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        operators.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    traced = torch.compile(lambda x: ops.linear(x, weight, bias), backend=backend, fullgraph=True)
    for tokens in (3, 7):
        x = rows(tokens, IC)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(traced(x), ops.linear(x, weight, bias))
    assert [name for name in operators if name.startswith("tersor")] == ["tersor.mixed_linear.default"]


@pytest.mark.parametrize("gated", [False, True])
def test_the_operator_has_a_meta_twin_and_gradients(gated: bool) -> None:
    assignment = levels(16, 5)
    plain = mixed(matrix(16), assignment)
    weight = MixedWeight.gate_up(plain, plain) if gated else plain
    call = (*row_sets.tensors_of(weight), None, None, int(gated))
    operator = torch.ops.tersor.mixed_linear.default
    torch.library.opcheck(operator, (rows(3, IC), *call), test_utils=("test_schema", "test_faketensor"))
    found, x = operator(rows(3, IC).to("meta"), *call), rows(3, IC).requires_grad_()
    assert found.shape == (3, 16) and found.device.type == "meta"
    operator(x, *call).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(rows(3, IC), *call).dtype == ops.linear(rows(3, IC), plain).dtype == torch.bfloat16


def test_a_gated_product_with_other_gates_has_gradients() -> None:
    assignment = levels(16, 5)
    both = MixedWeight.gate_up(*(mixed(matrix(16, seed), assignment) for seed in (1, 2)))
    x = rows(3, IC).requires_grad_()
    y = ops.gated_linear(x, both, gate=Gate.GELU)
    torch.testing.assert_close(y, ops.gated_linear(x.detach(), both, gate=Gate.GELU))
    y.sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


def test_what_does_not_fit_is_refused_with_the_whole_weight_s_sizes() -> None:
    weight = mixed(matrix(20), levels(20))
    for call, words in (
        (
            lambda: ops.linear(rows(3, 64), weight),
            r"x has shape \[3, 64\], expected \[..., 192\] for a weight \[20, 192\]",
        ),
        (lambda: ops.linear(rows(3, IC), weight, rows(19)), r"bias is \[19\], expected \[20\]"),
        (lambda: ops.linear(rows(3, IC), weight, residual=rows(3, 19)), r"residual is \[3, 19\], expected \[3, 20\]"),
        (lambda: ops.gated_linear(rows(3, IC), weight), r"mixed weight \[20, 192\] is not MixedWeight.gate_up"),
        (lambda: ops.linear(rows(3, IC).half(), weight, rows(20)), r"bias is .*float32"),
    ):
        with pytest.raises(ShapeError, match=words):
            call()
