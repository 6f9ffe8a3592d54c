"""Experts with one mix for all of a layer: what they compute, by the definition and by launches."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from helpers import mixes
from helpers.fakes import FakeGpu, pretended

from tersor import ops
from tersor.errors import ShapeError
from tersor.formats import Assignment, Mix, get_scheme
from tersor.formats.mix import MOST_LEVELS
from tersor.layouts import MixedWeight, StackedMixedWeight, StackedWeight
from tersor.layouts.gated import separate
from tersor.ops import Gate, grouped

EXPERTS, HIDDEN, INNER = 3, 192, 128
MIX = Mix((get_scheme("uint3", 32), get_scheme("fp5_e2m2"), get_scheme("int8", 64)))
CHANNELS, ROWS = mixes.levels(INNER, 1, MIX), mixes.levels(HIDDEN, 2, MIX)


def expert(assignment: Assignment, ic: int, seed: int) -> MixedWeight:
    """A random weight with every row at its level."""
    weight = torch.randn(len(assignment.level), ic, generator=torch.Generator().manual_seed(seed)) / ic**0.5
    return mixes.mixed(weight, assignment)


def pairs() -> list[MixedWeight]:
    """Gate and up of every expert."""
    halves = [[expert(CHANNELS, HIDDEN, 2 * number + half) for number in range(EXPERTS)] for half in (0, 1)]
    return [MixedWeight.gate_up(gate, up) for gate, up in zip(*halves, strict=True)]


@pytest.fixture(scope="module")
def layer() -> tuple[StackedMixedWeight, StackedMixedWeight]:
    """Gate and up, interleaved set by set, and down."""
    downs = [expert(ROWS, INNER, 20 + number) for number in range(EXPERTS)]
    return StackedMixedWeight.stack(pairs()), StackedMixedWeight.stack(downs)


def inputs(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, the experts of each token, one of them none, and their weights."""
    drawing = torch.Generator().manual_seed(tokens)
    index = torch.randint(EXPERTS, (tokens, 2), generator=drawing)
    index[0, 1] = EXPERTS
    return torch.randn(tokens, HIDDEN, generator=drawing).to(dtype), index, torch.rand(tokens, 2, generator=drawing)


def biases(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is added to both products of every expert."""
    drawing = torch.Generator().manual_seed(7)
    sizes = {"gate_up_bias": 2 * INNER, "down_bias": HIDDEN}
    return {name: torch.randn(EXPERTS, rows, generator=drawing).to(dtype) for name, rows in sizes.items()}


def test_a_token_gets_what_decoded_experts_give_it(layer: tuple[StackedMixedWeight, StackedMixedWeight]) -> None:
    x, index, weights = inputs(5, torch.float64)
    weights, rest = weights.double(), biases(torch.float64)
    gate_up, down = (weight.dequantize(torch.float64) for weight in layer)
    total = torch.zeros(5, HIDDEN, dtype=torch.float64)
    for token, rank in ((token, rank) for token in range(5) for rank in range(2)):
        number = int(index[token, rank])
        if number < EXPERTS:
            both = gate_up[number] @ x[token] + rest["gate_up_bias"][number]
            inner = Gate.SILU.combine(*separate(both))
            total[token] += weights[token, rank] * (down[number] @ inner + rest["down_bias"][number])
    torch.testing.assert_close(ops.experts(x, *layer, index, weights, **rest), total, rtol=1e-6, atol=1e-6)


def test_rows_lie_by_level_and_every_expert_is_the_weight_it_was(
    layer: tuple[StackedMixedWeight, StackedMixedWeight],
) -> None:
    gate_up, _ = layer
    assert [one.shape[0] for one in gate_up.sets] == [EXPERTS] * 3 and gate_up.assignment == CHANNELS
    alone = pairs()
    decoded = gate_up.to_layout(lambda _: "tiles_float16").to_layout(lambda _: "stream").dequantize()
    assert all(torch.equal(decoded[number], alone[number].dequantize()) for number in range(EXPERTS))
    again = StackedMixedWeight.of(CHANNELS, gate_up.sets, gated=True)
    assert again.shape == gate_up.shape and torch.equal(again.dequantize(), decoded)
    other = expert(mixes.levels(HIDDEN, 3, MIX), INNER, 1)
    with pytest.raises(ShapeError, match="have one mix: the levels of their output features differ"):
        StackedMixedWeight.stack([expert(ROWS, INNER, 0), other])


def test_the_operator_is_traced_whole(layer: tuple[StackedMixedWeight, StackedMixedWeight]) -> None:
    x, index, weights = inputs(4, torch.float32)
    compiled = torch.compile(
        lambda *given: ops.experts(given[0], *layer, *given[1:]) * 2, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(x, index, weights), ops.experts(x, *layer, index, weights) * 2)


gpu = pretended("NVIDIA H200")
"""An H200, or the chip a test names, that launches and does not compute."""


def uniform(rows: int, ic: int) -> StackedWeight:
    """Weights of one scheme."""
    packed = [mixes.pack(torch.randn(rows, ic), get_scheme("fp6_e2m3")) for _ in range(EXPERTS)]
    return StackedWeight.stack(packed)


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA A100"], indirect=True)
@pytest.mark.parametrize("tokens", [3, 300])
def test_every_level_is_a_launch_by_the_same_tables_on_older_gpus_and_where_asked_for_invariance(
    gpu: FakeGpu, layer: tuple[StackedMixedWeight, StackedMixedWeight], tokens: int
) -> None:
    gate_up, down = (weight.to_layout(lambda _: "tiles_float16") for weight in layer)
    x, _, _ = inputs(tokens, torch.float16)
    with ops.using(batch_invariant=gpu.chips[0].capability == (9, 0)):
        for _ in range(2):
            gpu.launches.clear()
            ops.routed_experts(x, torch.randn(tokens, EXPERTS), gate_up, down, 2, **biases(torch.float16))
    products = [launch for launch in gpu.launches if "experts_sm" in launch.kernel]
    route, combine = gpu.launches[0], gpu.launches[-1]
    assert [launch["weight"] for launch in products] == [one.data.data_ptr() for one in (*gate_up.sets, *down.sets)]
    assert {launch["order"] for launch in products} == {route["order"]} and combine["position"] == route["position"]
    assert all(len({launch["y"] for launch in of}) == 3 for of in (products[:3], products[3:]))
    assert all(launch["bias"] for launch in products)
    assert len(gpu.launches) - len(products) in (2, 3)  # tokens are put in order once, where they are


@pytest.mark.parametrize("tokens", [3, 300])
def test_all_levels_are_one_launch_whose_results_go_where_they_belong(
    gpu: FakeGpu, layer: tuple[StackedMixedWeight, StackedMixedWeight], tokens: int
) -> None:
    gate_up, down = (weight.to_layout(lambda _: "tiles_float16") for weight in layer)
    x, _, _ = inputs(tokens, torch.float16)
    own = biases(torch.float16)
    for _ in range(2):
        gpu.launches.clear()
        ops.routed_experts(x, torch.randn(tokens, EXPERTS), gate_up, down, 2, **own)
    route, *gathered, first, second, combine = gpu.launches
    assert len(gathered) <= 1 and all("gather" in launch.kernel for launch in gathered)
    assert combine["y"] == second["y"] and {first["order"], second["order"]} == {route["order"]}
    for launch, weight, bias in zip((first, second), (gate_up, down), own.values(), strict=True):
        assert "experts_mixed_sm90" in launch.kernel and launch.programmatic
        pointers = struct.unpack(f"@{2 * MOST_LEVELS}Q", launch["sets"])
        held = [address for one in weight.sets for address in (one.data.data_ptr(), one.scale.data_ptr())]
        assert list(pointers) == [*held, *[0] * (2 * MOST_LEVELS - 6)]
        shares = struct.unpack("@32i", launch["shares"])
        assert shares[0:12:4] == tuple(one.shape[1] for one in weight.sets)
        assert 0 < shares[1] < shares[5] < shares[9] == launch.grid[0] and set(shares[13::4]) == {shares[9]}
        assert weight.features is not None and launch["features"] == weight.features.data_ptr()
        assert launch["bias"] == bias.data_ptr() and launch["bias_rows"] == weight.shape[1]
    assert first["outputs"] == INNER and second["outputs"] == HIDDEN


def test_a_mix_beside_one_scheme_is_multiplied_too(
    gpu: FakeGpu, layer: tuple[StackedMixedWeight, StackedMixedWeight]
) -> None:
    gate_up = layer[0].to_layout(lambda _: "tiles_float16")
    down = uniform(HIDDEN, INNER).to_layout("tiles_float16")
    x, index, weights = inputs(4, torch.float16)
    assert not grouped.obstacle(x, gate_up, down) and not ops.experts_obstacle(x, gate_up, down)
    ops.experts(x, gate_up, down, index, weights)
    kinds = [launch.kernel for launch in gpu.launches if "experts" in launch.kernel and "sm90" in launch.kernel]
    assert ["experts_mixed_sm90" in kind for kind in kinds] == [True, False]
    stream = layer[0]
    assert "lie in stream" in grouped.obstacle(x, stream, down)


def test_activations_are_quantised_once_for_all_levels(gpu: FakeGpu) -> None:
    one: dict[str, Any] = {"scheme": get_scheme("fp6_e2m3")}
    mix = Mix((get_scheme("fp5_e2m2"), one["scheme"]))
    level = Assignment(mix, bytes([0, 1] * (INNER // 2)))
    halves = [expert(level, HIDDEN, number) for number in range(2 * EXPERTS)]
    both = [MixedWeight.gate_up(*halves[2 * number : 2 * number + 2]) for number in range(EXPERTS)]
    gate_up = StackedMixedWeight.stack(both).to_layout(lambda _: "tiles_float8_e4m3fn")
    down = uniform(HIDDEN, INNER).to_layout("tiles_float8_e4m3fn")
    x, index, weights = inputs(4, torch.float16)
    ops.experts(x, gate_up, down, index, weights)
    kinds = ["quantize" in launch.kernel for launch in gpu.launches]
    assert sum(kinds) == 2 and sum("_sm90_" in launch.kernel for launch in gpu.launches) == 2
    first, second = (launch for launch in gpu.launches if "_sm90_" in launch.kernel)
    assert first["x_scale"] and second["x_scale"]
