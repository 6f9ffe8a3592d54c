"""Experts of a mix on a GPU: what decoded experts give, in a graph too, with tokens that go elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.mixes import IC, MIX, levels, matrix, mixed, pack

from tersor import formats, hardware, ops
from tersor.formats import Activations, Assignment, Mix, get_scheme
from tersor.kernels.tune import experts as tune
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


def on_gpu(
    weight: StackedMixedWeight, dtype: torch.dtype, activations: Activations = Activations.NATIVE
) -> StackedMixedWeight:
    """Return the weights of experts on the GPU, every level in the layout for activations of a dtype."""
    device = torch.device("cuda")
    alone = StackedMixedWeight.stack([weight.expert(number).to(device) for number in range(weight.experts)])
    return alone.to_layout(lambda scheme: ops.preferred_layout(scheme, dtype, device, activations))


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


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="row sets of experts are one launch on compute capability 9.0",
)
INTEGERS = Mix((get_scheme("uint4", 32), get_scheme("int8")))
FLOATS = Mix((get_scheme("fp5_e2m2"), get_scheme("fp6_e2m3")))
FOUR = Mix(tuple(get_scheme(name) for name in ("fp4_e2m1", "fp5_e2m2", "fp6_e2m3", "int8")))
KINDS = [
    (MIX, Activations.NATIVE),
    (FOUR, Activations.NATIVE),
    (INTEGERS, Activations.INT8),
    (FLOATS, Activations.E4M3),
]


@hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mix", "activations"), KINDS)
def test_every_tile_of_one_launch_gives_what_a_launch_a_level_gives(
    mix: Mix, activations: Activations, dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile in both products, on all CTAs and on thirteen; the same bits every time."""
    layer = experts(levels(IC, 3, mix=mix), levels(INNER, 4, mix=mix))
    gate_up, down = (on_gpu(weight, dtype, activations) for weight in layer)
    biases = {"gate_up_bias": rows(EXPERTS, gate_up.shape[1], dtype=dtype, seed=5) / 4}
    chip = hardware.of_device(0)
    for tokens in (1, 5, 16, 33, 200, 700):
        x, logits = rows(tokens, IC, dtype=dtype, seed=tokens), rows(tokens, EXPERTS, dtype=torch.float32, seed=7)
        with ops.using(batch_invariant=True):
            launched.clear()
            wanted = ops.routed_experts(x, logits, gate_up, down, TOP_K, **biases)
            assert sum("experts_sm90" in name for name in launched) == 2 * len(mix.levels)
        problems = [grouped.problems_of(weight, tokens, TOP_K, False) for weight in (gate_up, down)]
        for tile in tune.common_tiles(problems[0]):
            for sms in (chip.sms, 13):
                few = replace(chip, sms=sms)
                chosen = [tuple(tune.config(one, tile, few) for one in of) for of in problems]
                grouped.forget()
                with monkeypatch.context() as patch:
                    patch.setattr(tune, "choose_sets", lambda *_, chosen=chosen: chosen)
                    patch.setattr(tune, "counts", lambda *of, few=few, counts=tune.counts: counts(*of[:2], few, of[3]))
                    results = []
                    for _ in range(3):
                        launched.clear()
                        results.append(ops.routed_experts(x, logits, gate_up, down, TOP_K, **biases))
                        assert sum("experts_mixed_sm90" in name for name in launched) == 2
                        assert not any("experts_sm90" in name for name in launched)
                assert all(torch.equal(result, results[0]) for result in results), tile
                close = 2e-2 if dtype is torch.bfloat16 else 4e-3
                if tile.fast_sums:  # which may round what goes to the second product to another e4m3
                    close = 4e-2
                most = float(wanted.double().abs().max())
                assert float((results[0].double() - wanted.double()).abs().max()) <= close * most, (tile, sms)
    grouped.forget()
