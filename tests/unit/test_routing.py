"""Routing: the experts that transformers' own routers choose, tables that hold, and the sum over experts."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from helpers.fakes import FakeGpu, pretended

from tersor import ops
from tersor.errors import ShapeError
from tersor.kernels.tune.experts_problem import most_blocks
from tersor.ops import routing
from tersor.ops.tables import Tables

HIDDEN = 64

ROUTERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen3": ("qwen3_moe", "Qwen3MoeTopKRouter", {"num_experts": 12, "norm_topk_prob": True}, {}),
    "qwen3 without norm": (
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        {"num_experts": 12, "norm_topk_prob": False},
        {"normalize": False},
    ),
    "mixtral": ("mixtral", "MixtralTopKRouter", {"num_local_experts": 12}, {}),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", {"num_local_experts": 12}, {}),
    "deepseek v2": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {"n_routed_experts": 12, "routed_scaling_factor": 16.0, "topk_method": "greedy"},
        {"normalize": False, "scale": 16.0},
    ),
    "deepseek v2 in groups": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {"n_routed_experts": 12, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        {"normalize": False, "groups": 4, "top_groups": 2},
    ),
    "deepseek v3": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
        {"scoring": "sigmoid", "groups": 3, "top_groups": 2, "scale": 2.5},
    ),
    "deepseek v3 in one group": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {"n_routed_experts": 12, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": False},
        {"scoring": "sigmoid", "normalize": False, "scale": 1.5},
    ),
}
"""Name -> model type, its router, the config's settings, and the options of `ops.route` that say the same."""


@pytest.mark.parametrize("name", ROUTERS)
def test_experts_and_weights_are_those_of_transformers(name: str) -> None:
    model_type, router, settings, options = ROUTERS[name]
    modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    configuration = importlib.import_module(f"transformers.models.{model_type}.configuration_{model_type}")
    config_class = getattr(configuration, router.replace("TopKRouter", "Config").replace("TopkRouter", "Config"))
    module = getattr(modeling, router)(config_class(hidden_size=HIDDEN, num_experts_per_tok=4, **settings))
    torch.manual_seed(0)
    for tensor in module.state_dict().values():
        tensor.normal_()
    bias = getattr(module, "e_score_correction_bias", None)
    with torch.no_grad():
        logits, weights, index = module(torch.randn(50, HIDDEN))
        found_index, found_weights = ops.route(logits, 4, bias=bias, **options)
    assert found_index.dtype == torch.int32 and found_weights.dtype == torch.float32
    index, order = index.sort(dim=1)  # some routers leave the order of a token's experts open
    found_index, found_order = found_index.sort(dim=1)
    assert torch.equal(found_index.long(), index)
    torch.testing.assert_close(found_weights.gather(1, found_order), weights.gather(1, order), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_best_expert_comes_first_and_of_equals_the_lower_index(scoring: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, -0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert ops.route(logits, 5, scoring=scoring)[0].tolist() == [[1, 3, 0, 2, 4], [0, 1, 2, 3, 4]]
    index, weights = ops.route(logits.bfloat16(), 4, scoring=scoring, groups=3, top_groups=2)
    assert index.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert (weights.diff(dim=1) <= 0).all()


def test_nan_is_never_better_than_a_number() -> None:
    nan, low = float("nan"), -torch.inf
    logits = torch.tensor([[nan, low, 1.0, nan, 0.0, nan]])
    index, weights = ops.route(logits, 5)
    assert index.tolist() == [[2, 4, 0, 1, 3]]
    assert weights[0, 2:].tolist() == [0.0, 0.0, 0.0]
    grouped = torch.tensor([[nan, nan, low, low, 0.0, low]])
    assert ops.route(grouped, 4, groups=3, top_groups=2)[0].tolist() == [[4, 0, 1, 5]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_bias_counts_in_the_choice_and_not_in_the_weights(scoring: str) -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 5.0])
    scores = logits.softmax(1) if scoring == "softmax" else logits.sigmoid()
    index, weights = ops.route(logits, 2, scoring=scoring, normalize=False, bias=bias, scale=3.0)
    assert index.tolist() == [[2, 0]]
    torch.testing.assert_close(weights, 3 * scores[:, [2, 0]])


def check_tables(found: Tables, index: torch.Tensor) -> None:
    """Assert what tables promise, from the index alone."""
    flat, experts, size = index.reshape(-1).tolist(), found.experts, found.block_tokens
    keys = [expert if 0 <= expert < experts else experts for expert in flat]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    assert found.order.tolist() == order
    assert [order[place] for place in found.position.tolist()] == list(range(len(keys)))
    blocks: list[list[int]] = []
    start = 0
    for expert in range(experts):
        end = start + keys.count(expert)
        first = len(blocks)
        blocks += [[expert, first, start, end]] * -(-(end - start) // size)
        start = end
    head, *rest = found.blocks.tolist()
    assert head == [len(blocks), start, 0, 0]
    assert rest[: len(blocks)] == blocks
    assert len(rest) == most_blocks(len(keys), experts, size) >= len(blocks)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "top_k", "experts", "size"), [(1, 8, 128, 8), (37, 3, 5, 4), (9, 1, 1, 2)])
def test_tables_hold_for_every_index(tokens: int, top_k: int, experts: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    some = torch.randint(-2, experts + 2, (tokens, top_k), dtype=dtype)  # empty experts and none among them
    for index in (some, some.clamp(0, experts - 1), torch.full_like(some, experts - 1), torch.full_like(some, -1)):
        check_tables(routing.tables(index, experts, size), index)
    check_tables(routing.tables(some[:0], experts, size), some[:0])


def test_choice_and_tables_at_once_are_those_of_two_calls() -> None:
    logits = torch.randn(11, 6)
    index, weights, found = routing.route_tables(logits, 2, 4, scoring="sigmoid", bias=torch.randn(6), scale=2.0)
    assert weights.shape == (11, 2)
    check_tables(found, index)
    assert found.blocks.data_ptr() % 16 == found.memory.data_ptr() % 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sum_over_experts_leaves_out_pairs_without_one(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    index = torch.tensor([[3, 0], [9, 3], [-1, 7], [1, 1]])
    found = routing.tables(index, 4, 8)
    y, weights, addend = torch.randn(8, 5).to(dtype), torch.randn(4, 2), torch.randn(4, 5).to(dtype)
    y[5:] = torch.nan  # three pairs have no expert
    expected = torch.zeros(4, 5)
    for place, pair in enumerate(found.order.tolist()[:5]):
        expected[pair // 2] += weights.view(-1)[pair] * y[place].float()
    torch.testing.assert_close(routing.combine(y, weights, found), expected.to(dtype))
    torch.testing.assert_close(routing.combine(y, weights, found, addend), (expected + addend.float()).to(dtype))


def pipeline(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    index, weights, found = routing.route_tables(logits, 2, 4)
    return routing.combine(y, weights + ops.route(logits, 2)[1], routing.tables(index, 6, found.block_tokens), y[:3])


def test_the_operators_compile_in_one_graph_and_have_shapes_without_memory() -> None:
    logits, y = torch.randn(3, 6), torch.randn(6, 5)
    expected = pipeline(logits, y)
    assert torch.equal(torch.compile(pipeline, fullgraph=True, backend="aot_eager")(logits, y), expected)
    assert pipeline(logits.to("meta"), y.to("meta")).shape == expected.shape


def test_gradients_are_those_of_plain_torch() -> None:
    torch.manual_seed(3)
    logits, y = torch.randn(3, 6, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    index, weights, found = routing.route_tables(logits, 2, 4)
    routing.combine(y, weights, found).square().sum().backward()
    got = logits.grad, y.grad
    logits.grad = y.grad = None
    plain = logits.softmax(1).gather(1, index.long())
    rows = y[found.position.long()].view(3, 2, 5)
    ((plain / plain.sum(1, keepdim=True))[:, :, None] * rows).sum(1).square().sum().backward()
    for ours, theirs in zip(got, (logits.grad, y.grad), strict=True):
        torch.testing.assert_close(ours, theirs)


LOGITS = torch.zeros(2, 12)
WRONG: dict[str, Any] = {
    r"logits are \[2\] torch.float32, expected \[tokens, experts\]": lambda: ops.route(torch.zeros(2), 1),
    r"logits are \[2, 12\] torch.float64": lambda: ops.route(LOGITS.double(), 1),
    r"bias is \[3\] .*, expected \[12\] floats": lambda: ops.route(LOGITS, 1, bias=torch.zeros(3)),
    "scoring is 'softmix', expected 'softmax' or 'sigmoid'": lambda: ops.route(LOGITS, 1, scoring="softmix"),
    "top_k is 13, expected 1 to 12": lambda: ops.route(LOGITS, 13),
    "top_k is 7, expected 1 to 6 in 2 groups of 3": lambda: ops.route(LOGITS, 7, groups=4, top_groups=2),
    "12 experts do not make 5 equal groups": lambda: ops.route(LOGITS, 1, groups=5),
    "top_groups is 3, expected 1 to 2": lambda: ops.route(LOGITS, 1, groups=2, top_groups=3),
    "two best experts, these have one each": lambda: ops.route(LOGITS, 1, scoring="sigmoid", groups=12, top_groups=2),
    "12 experts and blocks of 0 tokens": lambda: routing.route_tables(LOGITS, 1, 0),
    r"index is \[4\] torch.int64": lambda: routing.tables(torch.zeros(4, dtype=torch.int64), 2, 4),
    r"expected \[tokens, experts of a token\] in int32": lambda: routing.tables(torch.zeros(4, 1), 2, 4),
    "for 6 pairs": lambda: sums(weights=torch.zeros(2, 2)),
    r"y is \[6, 3\] torch.int32": lambda: sums(y=torch.zeros(6, 3, dtype=torch.int32)),
    r"addend is \[6, 3\] .*, expected \[3, 3\]": lambda: sums(addend=torch.zeros(6, 3)),
}


def sums(**changes: torch.Tensor) -> torch.Tensor:
    """Call `routing.combine` for 3 tokens of 2 experts with one thing wrong."""
    tensors = {"y": torch.zeros(6, 3), "weights": torch.zeros(3, 2), **changes}
    return routing.combine(sorted_by=routing.tables(torch.zeros(3, 2, dtype=torch.int32), 2, 4), **tensors)


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        WRONG[message]()


gpu = pretended("NVIDIA H200")
"""Tensors of the CPU pass for those of an H200, or of the chip a test names."""


def test_kernels_get_the_addresses_of_what_they_read_and_write(gpu: FakeGpu) -> None:
    logits, bias = torch.randn(70, 9)[:, :8], torch.randn(8)
    index, weights, found = routing.route_tables(logits, 2, 16, scoring="sigmoid", bias=bias, scale=2.5)
    launch, (order, position, blocks) = gpu.last, found.addresses
    assert (launch["given"], launch["stride"], launch["bias"]) == (logits.data_ptr(), 9, bias.data_ptr())
    assert (launch["index"], launch["weights"]) == (index.data_ptr(), weights.data_ptr())
    assert (launch["order"], launch["position"], launch["blocks"]) == (order, position, blocks)
    assert (found.order.data_ptr(), found.position.data_ptr(), found.blocks.data_ptr()) == (order, position, blocks)
    assert (launch["tokens"], launch["block_tokens"], launch["scale"]) == (70, 16, 2.5)
    assert launch["arrived"] and launch.grid == (3, 1, 1) and launch.programmatic
    ops.route(logits, 2)
    assert gpu.last["order"] == gpu.last["arrived"] == gpu.last["bias"] == 0

    given = torch.zeros(5, 2, dtype=torch.int64)
    found = routing.tables(given, 8, 16)
    assert (gpu.last["given"], gpu.last["tokens"], gpu.last["blocks"]) == (given.data_ptr(), 10, found.addresses[2])
    y, factors, addend = torch.zeros(10, 24).half(), torch.zeros(5, 2), torch.zeros(5, 24).half()
    out = routing.combine(y, factors, found, addend)
    assert [gpu.last[name] for name in ("y", "weights", "position", "blocks", "addend", "out")] == [
        y.data_ptr(),
        factors.data_ptr(),
        *found.addresses[1:],
        addend.data_ptr(),
        out.data_ptr(),
    ]
    assert (gpu.last["top_k"], gpu.last["channels"], gpu.last["aligned"]) == (2, 24, 1)
    routing.combine(torch.zeros(10, 20).half(), factors, found)
    assert (gpu.last["addend"], gpu.last["aligned"]) == (0, 0)


@pytest.mark.parametrize("gpu", ["NVIDIA A100"], indirect=True)
def test_older_gpus_route_without_programmatic_launches_and_the_reference_what_has_no_kernel(gpu: FakeGpu) -> None:
    routing.route_tables(torch.randn(3, 8), 2, 16)
    assert gpu.last.grid == (1, 1, 1) and not gpu.last.programmatic
    launches = len(gpu.launches)
    wide = torch.randn(3, 600)
    index, _, found = routing.route_tables(wide, 20, 16)
    assert torch.equal(index.long(), wide.argsort(dim=1, descending=True)[:, :20])
    check_tables(found, index)
    assert len(gpu.launches) == launches
