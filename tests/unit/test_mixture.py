"""The experts of a layer: what they compute, by the definition and by launches, and what their operators refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.fakes import FakeGpu, pretended

from tersor import ops
from tersor.compress.rtn import quantize_rtn
from tersor.errors import ShapeError
from tersor.formats import get_scheme
from tersor.hardware import CHIPS
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune import experts_sm80
from tersor.kernels.tune.experts_problem import most_blocks
from tersor.kernels.tune.tile import Tile
from tersor.layouts import STREAM, PackedWeight, StackedWeight
from tersor.layouts.gated import gated_channels, separate
from tersor.ops import Gate, grouped

EXPERTS, HIDDEN, INNER = 4, 64, 40


def stacked(rows: int, ic: int, name: str = "fp6_e3m2", group_size: int | None = None) -> StackedWeight:
    """Random weights of a layer's experts."""
    scheme = get_scheme(name, group_size)
    weights = [quantize_rtn(torch.randn(rows, ic) / math.sqrt(ic), scheme) for _ in range(EXPERTS)]
    return StackedWeight.stack([PackedWeight.from_encoded(weight) for weight in weights])


@pytest.fixture(scope="module")
def layer() -> tuple[StackedWeight, StackedWeight]:
    """Gate and up, interleaved, and down."""
    torch.manual_seed(0)
    return StackedWeight.gate_up(stacked(INNER, HIDDEN), stacked(INNER, HIDDEN)), stacked(HIDDEN, INNER)


def inputs(tokens: int = 5, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, the experts of each token, and their weights."""
    return torch.randn(tokens, HIDDEN), torch.randint(EXPERTS, (tokens, top_k)), torch.rand(tokens, top_k)


def plain(
    x: torch.Tensor, layer: tuple[StackedWeight, StackedWeight], index: torch.Tensor, weights: torch.Tensor, **rest: Any
) -> torch.Tensor:
    """The same from decoded weights, a pair at a time."""
    gate_up, down = (weight.dequantize() for weight in layer)
    gate = rest.get("gate", Gate.SILU)
    total = torch.zeros(x.shape)
    for token in range(len(x)):
        for rank, expert in enumerate(index[token].tolist()):
            if not 0 <= expert < EXPERTS:
                continue
            both = gate_up[expert] @ x[token]
            if "gate_up_bias" in rest:
                both = both + rest["gate_up_bias"][expert]
            outer = down[expert] @ gate.combine(*separate(both))
            if "down_bias" in rest:
                outer = outer + rest["down_bias"][expert]
            total[token] += weights[token, rank] * outer
    return total + rest.get("addend", 0)


@pytest.mark.parametrize("gate", list(Gate))
def test_a_token_gets_the_weighted_sum_of_what_its_experts_give(
    layer: tuple[StackedWeight, StackedWeight], gate: Gate
) -> None:
    x, index, weights = inputs()
    index[0, 1], index[1, 0] = EXPERTS, -1  # no experts
    rest = {
        "gate": gate,
        "gate_up_bias": torch.randn(EXPERTS, 2 * INNER),
        "down_bias": torch.randn(EXPERTS, HIDDEN),
        "addend": torch.randn(5, HIDDEN),
    }
    torch.testing.assert_close(
        ops.experts(x, *layer, index, weights, **rest), plain(x, layer, index, weights, **rest), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        ops.experts(x, *layer, index, weights, gate=gate), plain(x, layer, index, weights, gate=gate)
    )


def test_gates_are_what_the_models_compute() -> None:
    gate, up = torch.tensor([-3.0, 0.5, 9.0]), torch.tensor([2.0, -9.0, 9.0])
    assert torch.equal(Gate.SILU.combine(gate, up), torch.nn.functional.silu(gate) * up)
    clamped = torch.tensor([-3.0, 0.5, 7.0])
    gpt_oss = clamped * torch.sigmoid(1.702 * clamped) * (torch.tensor([2.0, -7.0, 7.0]) + 1)
    assert torch.equal(Gate.CLAMPED.combine(gate, up), gpt_oss)
    assert not torch.equal(Gate.GELU.combine(gate, up), Gate.GELU_TANH.combine(gate, up))


def test_logits_choose_the_experts_of_route(layer: tuple[StackedWeight, StackedWeight]) -> None:
    x, _, _ = inputs()
    logits = torch.randn(5, EXPERTS)
    index, weights = ops.route(logits, 2, scoring="sigmoid", scale=2.5)
    routed = ops.routed_experts(x, logits, *layer, 2, scoring="sigmoid", scale=2.5)
    assert torch.equal(routed, ops.experts(x, *layer, index, weights))


def test_gradients_reach_activations_weights_and_biases(layer: tuple[StackedWeight, StackedWeight]) -> None:
    x, index, weights = inputs(3)
    bias = torch.randn(EXPERTS, 2 * INNER)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weights, bias)]

    def run(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.experts(x, *layer, index, weights, gate_up_bias=bias)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_the_operator_is_traced_whole(layer: tuple[StackedWeight, StackedWeight]) -> None:
    x, index, weights = inputs()
    compiled = torch.compile(
        lambda *given: ops.experts(given[0], *layer, *given[1:]) * 2, backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(x, index, weights), ops.experts(x, *layer, index, weights) * 2)


def test_autocast_casts_activations_and_what_is_added(layer: tuple[StackedWeight, StackedWeight]) -> None:
    x, index, weights = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ops.experts(x, *layer, index, weights, addend=x)
    assert torch.equal(result, ops.experts(x.bfloat16(), *layer, index, weights, addend=x.bfloat16()))


def test_a_stack_keeps_its_weights_in_every_layout(layer: tuple[StackedWeight, StackedWeight]) -> None:
    gate_up, _ = layer
    tiles = gate_up.to_layout("tiles_float16")
    assert tiles.data.shape[0] == EXPERTS and torch.equal(tiles.to_layout(STREAM).data, gate_up.data)
    assert torch.equal(tiles.expert(2).dequantize(), gate_up.expert(2).dequantize())
    gate, up = gate_up.split_gate_up()
    assert torch.equal(StackedWeight.gate_up(gate, up).data, gate_up.data) and gated_channels(gate_up.shape[1]) == INNER
    uneven = stacked(5, HIDDEN, "uint4", 16)
    again = uneven.to_layout("tiles_bfloat16").to_layout(STREAM)
    assert torch.equal(again.dequantize(), uneven.dequantize()) and again.nbytes == uneven.nbytes


def test_experts_of_different_kinds_are_no_stack() -> None:
    one, other = stacked(8, HIDDEN).expert(0), stacked(8, HIDDEN, "int4").expert(0)
    with pytest.raises(ShapeError, match=r"must be of one kind: fp6_e3m2:row:float16 .* and int4"):
        StackedWeight.stack([one, other])
    with pytest.raises(ShapeError, match="at least one expert"):
        StackedWeight.stack([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(5, HIDDEN + 1)}, r"x is \[5, 65\] torch.float32, expected \[T, 64\]"),
        ({"index": torch.zeros(5, 3, dtype=torch.int64)}, r"index is \[5, 3\] torch.int64, expected .* \[5, 2\]"),
        ({"index": torch.zeros(5, 2)}, r"index is \[5, 2\] torch.float32"),
        ({"weights": torch.zeros(4, 2)}, r"weights are \[4, 2\] torch.float32, expected floats \[5, K\]"),
        ({"down": stacked(HIDDEN, INNER + 1)}, r"so down is \[4, 64, 40\], and it is \[4, 64, 41\]"),
        ({"down_bias": torch.zeros(EXPERTS, 3)}, r"down_bias is \[4, 3\] torch.float32, expected \[4, 64\]"),
        ({"addend": torch.zeros(5, HIDDEN).half()}, r"addend is \[5, 64\] torch.float16, expected \[5, 64\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    layer: tuple[StackedWeight, StackedWeight], changes: dict[str, Any], message: str
) -> None:
    x, index, weights = inputs()
    arguments = {"x": x, "gate_up": layer[0], "down": layer[1], "index": index, "weights": weights, **changes}
    with pytest.raises(ShapeError, match=message):
        ops.experts(**arguments)


@pytest.mark.parametrize(("tokens", "experts"), [(5, EXPERTS + 1), (4, EXPERTS), (5, EXPERTS - 1)])
def test_logits_that_do_not_fit_are_named(
    layer: tuple[StackedWeight, StackedWeight], tokens: int, experts: int
) -> None:
    with pytest.raises(ShapeError, match=rf"logits are \[{tokens}, {experts}\], expected \[5, {EXPERTS}\]"):
        ops.routed_experts(torch.zeros(5, HIDDEN), torch.zeros(tokens, experts), *layer, 2)


gpu = pretended("NVIDIA H200")
"""An H200, or the chip a test names, that launches and does not compute."""


def on_gpu(layer: tuple[StackedWeight, StackedWeight]) -> tuple[StackedWeight, StackedWeight]:
    gate_up, down = (weight.to_layout("tiles_float16") for weight in layer)
    return gate_up, down


def test_few_tokens_take_four_launches(gpu: FakeGpu, layer: tuple[StackedWeight, StackedWeight]) -> None:
    gate_up, down = on_gpu(layer)
    x, bias = torch.randn(3, HIDDEN).half(), torch.randn(EXPERTS, 2 * INNER).half()
    for _ in range(2):
        gpu.launches.clear()
        y = ops.routed_experts(x, torch.randn(3, EXPERTS), gate_up, down, 2, gate_up_bias=bias)
    route, up, below, combine = gpu.launches
    assert route["block_tokens"] == 8 and route["order"] == up["order"] == below["order"]
    assert (up["weight"], up["scale"], up["bias"]) == (
        *(t.data_ptr() for t in (gate_up.data, gate_up.scale)),
        bias.data_ptr(),
    )
    assert up["x_map"].address == x.data_ptr() and up["x_map"].box[1] == up["x_rows"] == 1
    assert below["x_map"].address == up["y"] and below["bias"] == 0 and below["x_rows"] == 8
    assert (up["oc"], up["ic"], below["oc"], below["ic"]) == (2 * INNER, HIDDEN, HIDDEN, INNER)
    assert (combine["y"], combine["out"], combine["ready"]) == (below["y"], y.data_ptr(), 1)
    assert (up["following"], below["following"]) == (down.data.data_ptr(), 0)
    assert combine["position"] == route["position"] and all(launch.programmatic for launch in gpu.launches)
    assert up.grid == below.grid or up.grid[0] % 132 == below.grid[0] % 132 == 0
    assert up["following_bytes"] * EXPERTS == down.data.nbytes and up["following_bytes"] % 16 == 0


def test_the_second_products_weights_are_fetched_ahead_where_half_of_l2_has_room(
    gpu: FakeGpu, layer: tuple[StackedWeight, StackedWeight]
) -> None:
    gate_up, down = on_gpu(layer)
    gpu.chips[0] = replace(gpu.chips[0], l2_bytes=2 * down.data.nbytes // EXPERTS)
    for tokens, fetched in ((1, 1), (2, 0)):
        ops.routed_experts(torch.randn(tokens, HIDDEN).half(), torch.randn(tokens, EXPERTS), gate_up, down, 1)
        assert gpu.launches[-3]["following"] == fetched * down.data.data_ptr()


@pytest.mark.parametrize(
    ("hidden", "experts", "top_k", "message"),
    [
        (HIDDEN + 8, EXPERTS, 2, r"x is \[3, 72\]"),
        (HIDDEN, EXPERTS + 1, 2, r"logits are \[3, 5\]"),
        (HIDDEN, EXPERTS, EXPERTS + 1, "top_k is 5, expected 1 to 4"),
        (HIDDEN, EXPERTS, 0, "top_k is 0, expected 1 to 4"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_made_or_launched(
    gpu: FakeGpu, layer: tuple[StackedWeight, StackedWeight], hidden: int, experts: int, top_k: int, message: str
) -> None:
    gate_up, down = on_gpu(layer)
    with pytest.raises(ShapeError, match=message):
        ops.routed_experts(torch.zeros(3, hidden).half(), torch.zeros(3, experts), gate_up, down, top_k)
    assert not gpu.launches and not grouped._prepared


def test_many_tokens_are_put_in_order_first(
    gpu: FakeGpu, layer: tuple[StackedWeight, StackedWeight], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate_up, down = on_gpu(layer)
    wide = Tile(64, 2, 1, 1, 1)
    monkeypatch.setattr(
        tune, "choose_sets", lambda *ofs: [[tune.config(of, wide, gpu.chips[0]) for of in sets] for sets in ofs[:2]]
    )
    x = torch.randn(300, HIDDEN).half()
    ops.experts(x, gate_up, down, torch.zeros(300, 2, dtype=torch.int32), torch.rand(300, 2).half())
    tables, gather, up, below, combine = gpu.launches
    assert tables["tokens"] == 600 and gather["x"] == x.data_ptr() and up["x_map"].address == gather["y"]
    assert up["x_map"].sizes[1] == 600 + up["x_rows"] and below["x_map"].sizes[1] == 600 + below["x_rows"]
    assert below["x_map"].address == up["y"] and combine["y"] == below["y"]


def test_activations_of_eight_bits_are_quantised_in_order(
    gpu: FakeGpu, layer: tuple[StackedWeight, StackedWeight]
) -> None:
    gate_up, down = (weight.to_layout("tiles_float8_e4m3fn") for weight in layer)
    x = torch.randn(3, HIDDEN).half()
    ops.experts(x, gate_up, down, torch.zeros(3, 2, dtype=torch.int32), torch.rand(3, 2))
    tables, first, up, second, below, _ = gpu.launches
    assert (first["x"], first["order"], first["top_k"]) == (x.data_ptr(), tables["order"], 2)
    assert (up["x_map"].address, up["x_scale"]) == (first["codes"], first["scales"])
    assert (second["x"], second["order"]) == (up["y"], 0) and below["x_scale"] == second["scales"]


@pytest.mark.parametrize("gpu", ["NVIDIA A100"], indirect=True)
@pytest.mark.parametrize("tokens", [3, 300])
def test_older_gpus_take_four_launches_for_any_number_of_tokens(
    gpu: FakeGpu, layer: tuple[StackedWeight, StackedWeight], tokens: int
) -> None:
    gate_up, down = on_gpu(layer)
    x, bias = torch.randn(tokens, HIDDEN).half(), torch.randn(EXPERTS, HIDDEN).half()
    for _ in range(2):
        gpu.launches.clear()
        y = ops.routed_experts(x, torch.randn(tokens, EXPERTS), gate_up, down, 2, down_bias=bias)
    route, up, below, combine = gpu.launches
    assert all("experts_sm80" in launch.kernel for launch in (up, below))
    assert not any(launch.programmatic for launch in gpu.launches)
    for product, weight in ((up, gate_up), (below, down)):
        assert (product["order"], product["table"]) == (route["order"], route["blocks"])
        assert (product["weight"], product["scale"]) == (weight.data.data_ptr(), weight.scale.data_ptr())
        assert (product["oc"], product["ic"]) == weight.matrix and product["factor"] == weight.packing.factor
        most = min(2 * tokens, most_blocks(2 * tokens, EXPERTS, route["block_tokens"]))
        run, rows, runs = product.grid
        assert product["most_blocks"] == most and most <= run * runs < most + runs and rows == 1
    assert (up["x"], up["x_stride"], up["top_k"], up["bias"]) == (x.data_ptr(), HIDDEN, 2, 0)
    assert (below["x"], below["x_stride"], below["bias"]) == (up["y"], INNER, bias.data_ptr())
    assert (combine["y"], combine["out"]) == (below["y"], y.data_ptr())


@pytest.mark.parametrize("gpu", ["NVIDIA A100"], indirect=True)
def test_every_tile_that_may_be_split_has_sums_and_a_counter(
    gpu: FakeGpu, layer: tuple[StackedWeight, StackedWeight], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate_up, down = on_gpu(layer)
    monkeypatch.setattr(
        tune,
        "choose_sets",
        lambda *ofs: [[experts_sm80.config(of, 16, 3, gpu.chips[0]) for of in sets] for sets in ofs[:2]],
    )
    ops.experts(torch.randn(20, HIDDEN).half(), gate_up, down, torch.zeros(20, 2, dtype=torch.int32), torch.rand(20, 2))
    _, up, below, _ = gpu.launches
    assert up["splits"] == below["splits"] == 3 and up.grid == (2 + EXPERTS, 1, 3)
    assert up["partial"] == below["partial"] and up["arrived"] == below["arrived"]
    ((_, nbytes),) = gpu.memory.values()
    assert up["partial"] in gpu.memory and up["arrived"] - up["partial"] >= 4 * (2 + EXPERTS) * 3 * 16 * 128
    assert up["partial"] + nbytes - up["arrived"] >= 4 * (2 + EXPERTS)


@pytest.mark.parametrize("gpu", ["NVIDIA A100"], indirect=True)
def test_older_gpus_take_an_expert_at_a_time_where_activations_are_of_8_bits(
    gpu: FakeGpu, layer: tuple[StackedWeight, StackedWeight]
) -> None:
    gate_up, down = (weight.to_layout("tiles_float8_e4m3fn") for weight in layer)
    why = grouped.obstacle(torch.zeros(1, HIDDEN).half(), gate_up, down)
    assert why == "8-bit activations need compute capability 9.0, this is 8.0"


def test_newer_gpus_start_the_kernels_of_older_ones_early(layer: tuple[StackedWeight, StackedWeight]) -> None:
    gate_up, down = on_gpu(layer)
    newer = replace(CHIPS["NVIDIA H200"], capability=(12, 0))
    assert all(config.early for (config,) in grouped.configs(gate_up, down, 1, 2, False, newer))
