"""Experts of a mix on a GPU: what decoded experts give, in a graph too, with tokens that go elsewhere."""

from __future__ import annotations

import pytest
import torch
from helpers.mixes import IC, MIX, levels, matrix, mixed, pack

from tersor import formats, ops
from tersor.formats import Assignment
from tersor.layouts import MixedWeight, StackedMixedWeight, StackedWeight
from tersor.layouts.gated import gated_rows
from tersor.ops import Gate, grouped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float16, torch.bfloat16)
EXPERTS, TOP_K, INNER = 5, 2, 192


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return random activations on the GPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def experts(form: Assignment, channels: Assignment) -> tuple[StackedMixedWeight, StackedMixedWeight]:
    """Return a layer of random experts of one mix: gate and up of IC channels, and down to as many."""
    halves = [mixed(matrix(INNER, seed) / IC**0.5, channels) for seed in range(2 * EXPERTS)]
    both = [MixedWeight.gate_up(*halves[2 * number : 2 * number + 2]) for number in range(EXPERTS)]
    downs = [mixed(matrix(IC, 50 + number) / INNER**0.5, form) for number in range(EXPERTS)]
    return StackedMixedWeight.stack(both), StackedMixedWeight.stack(downs)


def on_gpu(weight: StackedMixedWeight, dtype: torch.dtype) -> StackedMixedWeight:
    """Return the weights of experts on the GPU, every level in the layout for activations of a dtype."""
    device = torch.device("cuda")
    alone = StackedMixedWeight.stack([weight.expert(number).to(device) for number in range(weight.experts)])
    return alone.to_layout(lambda scheme: ops.preferred_layout(scheme, dtype, device))


def expected(
    x: torch.Tensor,
    layer: tuple[StackedMixedWeight, StackedMixedWeight],
    index: torch.Tensor,
    weights: torch.Tensor,
    biases: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Return what decoded experts give in float64, with what passes between the products rounded."""
    gate_up, down = (weight.dequantize(torch.float64).cuda() for weight in layer)
    total = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for number in range(EXPERTS):
        tokens, ranks = (index == number).nonzero(as_tuple=True)
        both = x[tokens].double() @ gate_up[number].T + biases["gate_up_bias"][number].double()
        inner = Gate.SILU.of_rows(both).to(x.dtype).double()
        outer = inner @ down[number].T + biases["down_bias"][number].double()
        total.index_add_(0, tokens, outer * weights[tokens, ranks].double()[:, None])
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", [False, True])
def test_experts_of_a_mix_are_the_definition_in_a_graph_too(dtype: torch.dtype, whole: bool) -> None:
    layer = experts(
        levels(IC, 3), Assignment(MIX, bytes([0] * 64 + [1] * 64 + [2] * 64)) if whole else levels(INNER, 4)
    )
    gate_up, down = (on_gpu(weight, dtype) for weight in layer)
    biases = {
        "gate_up_bias": rows(EXPERTS, gated_rows(INNER), dtype=dtype, seed=5) / 4,
        "down_bias": rows(EXPERTS, IC, dtype=dtype, seed=6) / 4,
    }
    for tokens in (1, 5, 33, 200):
        x, logits = rows(tokens, IC, dtype=dtype, seed=tokens), rows(tokens, EXPERTS, dtype=torch.float32, seed=7)
        assert not grouped.obstacle(x, gate_up, down)

        def run(x: torch.Tensor = x, logits: torch.Tensor = logits) -> torch.Tensor:
            return ops.routed_experts(x, logits, gate_up, down, TOP_K, **biases)

        results = [run() for _ in range(10)]
        assert all(torch.equal(result, results[0]) for result in results)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        for _ in range(2):
            index, weights = ops.route(logits, TOP_K)
            y.fill_(torch.nan)
            graph.replay()
            want = expected(x, layer, index, weights, biases)
            assert float((y.double() - want).abs().max()) <= 3 * torch.finfo(dtype).eps * float(want.abs().max())
            x.normal_()
            logits.normal_()


def test_a_mix_beside_one_scheme_is_multiplied_by_the_same_tables() -> None:
    mix, _ = experts(levels(IC, 3), levels(INNER, 4))
    scheme = formats.get_scheme("fp6_e2m3")
    plain = StackedWeight.stack([pack(matrix(IC, 60 + number)[:, :INNER], scheme) for number in range(EXPERTS)])
    data, scale = plain.data.cuda(), plain.scale.cuda()
    down = StackedWeight(scheme, plain.shape, data, scale).to_layout("tiles_float16")
    gate_up = on_gpu(mix, torch.float16)
    x, index = rows(20, IC, dtype=torch.float16), torch.randint(EXPERTS, (20, TOP_K), device="cuda")
    weights = torch.rand(20, TOP_K, device="cuda")
    got = ops.experts(x, gate_up, down, index, weights)
    want = ops.experts(x.double().cpu(), mix, plain, index.cpu(), weights.double().cpu())
    assert float((got.double().cpu() - want).abs().max()) <= 4 * torch.finfo(torch.float16).eps * float(
        want.abs().max()
    )
