"""`tersor bench experts`: layers, rivals, rows and table, without a GPU."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tersor import ops
from tersor.bench import report
from tersor.bench.contenders import Calls, UnfitError
from tersor.bench.experts import contenders, measure, rivals
from tersor.bench.experts.contenders import Contender, Forward
from tersor.bench.experts.geometry import MODELS, Geometry, resolve
from tersor.bench.experts.layer import Layer, expected, random_layer, route
from tersor.bench.experts.measure import Row, Skipped
from tersor.errors import InputError
from tersor.formats import Activations, get_scheme
from tersor.layouts.packing import target_of

CPU = torch.device("cpu")
FP6 = get_scheme("fp6_e3m2")


def shrunk(name: str) -> Geometry:
    """A layer that routes as a model does, and has few small experts."""
    whole = MODELS[name]
    return replace(whole, experts=min(whole.experts, 32), top_k=min(whole.top_k, 4), hidden=64, ffn=32)


def small_layer(name: str, dtype: torch.dtype = torch.bfloat16) -> Layer:
    """Weights of a shrunk layer."""
    return random_layer(shrunk(name), dtype, CPU, seed=1)


def given(layer: Layer, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [n, H] in the layer's dtype, and logits [n, E]."""
    torch.manual_seed(n)
    return torch.randn(n, layer.geometry.hidden).to(layer.down.dtype), torch.randn(n, layer.geometry.experts)


def chosen(geometry: Geometry, logits: torch.Tensor, bias: torch.Tensor | None) -> dict[int, float]:
    """Expert -> weight of one token, by plain Python over logits [E]."""
    if geometry.scoring == "softmax":
        scores = logits.exp() / logits.exp().sum()
        worth = scores.tolist()
        allowed = set(range(geometry.experts))
    else:
        assert bias is not None
        scores = 1 / (1 + (-logits).exp())
        worth = (scores + bias).tolist()
        size = geometry.experts // geometry.groups
        groups = [sorted(worth[start : start + size])[-2:] for start in range(0, geometry.experts, size)]
        best = sorted(range(geometry.groups), key=lambda group: -sum(groups[group]))[: geometry.top_groups]
        allowed = {expert for expert in range(geometry.experts) if expert // size in best}
    experts = sorted(allowed, key=lambda expert: -worth[expert])[: geometry.top_k]
    total = sum(float(scores[expert]) for expert in experts) if geometry.normalize else 1
    return {expert: float(scores[expert]) / total * geometry.scale for expert in experts}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_go_where_the_models_router_sends_them(name: str) -> None:
    layer = small_layer(name)
    _, logits = given(layer, 6)
    index, weights = route(layer.geometry, logits, layer.choice_bias)
    for token in range(6):
        found = dict(zip(index[token].tolist(), weights[token].tolist(), strict=True))
        assert found == pytest.approx(chosen(layer.geometry, logits[token], layer.choice_bias), rel=1e-5)


def test_a_layer_is_the_weighted_sum_of_its_experts() -> None:
    layer = small_layer("gpt-oss-20b", torch.float32)
    x, logits = given(layer, 3)
    assert layer.gate_up_bias is not None and layer.down_bias is not None
    y = expected(layer, x, logits)
    for token in range(3):
        total = torch.zeros(64)
        for expert, weight in chosen(layer.geometry, logits[token], None).items():
            both = layer.gate_up[expert] @ x[token] + layer.gate_up_bias[expert]
            gate, up = both[:32].clamp(max=7), both[32:].clamp(-7, 7)
            inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            total += weight * (layer.down[expert] @ inner + layer.down_bias[expert])
        torch.testing.assert_close(y[token], total)


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes seconds; what it is given computes the same without it."""
    monkeypatch.setattr(rivals, "compiled", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)


@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_torch_computes_the_layer(name: str) -> None:
    layer = small_layer(name)
    ways = {
        (program, way): copies
        for program in ("torch", "compiled")
        for way, copies in contenders.torch_itself(program).build(layer, 2).items()
    }
    assert [way for _, way in ways] == ["grouped_mm", "batched_mm"] * 2
    for n in (1, 9):
        x, logits = given(layer, n)
        for way, copies in ways.items():
            assert len(copies) == 2, way
            for forward in copies:
                y = forward(x, logits)
                assert y.shape == x.shape and y.dtype == torch.bfloat16
                measure.check(y, expected(layer, x, logits), 0.02)


def test_batched_products_take_no_more_tokens_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = small_layer("olmoe")
    monkeypatch.setattr(rivals, "GATHERED", 8 * 4 * layer.gate_up[0].nbytes)
    for program in ("torch", "compiled"):
        (batched, *_) = contenders.torch_itself(program).build(layer, 2)["batched_mm"]
        batched(*given(layer, 8))
        with pytest.raises(UnfitError, match="it would copy 0 GB of weights"):
            batched(*given(layer, 9))


class HummingLayer:
    """humming's layer as its package documents it, over plain weights: rows sorted by expert, and where each starts."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.weight_schema = "schema"

    def load_from_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def transform(self) -> None:
        self.ready = True

    def __call__(
        self, rows: torch.Tensor, *, expert_layout: torch.Tensor, valid_shape_m: int, compute_config: str
    ) -> torch.Tensor:
        assert self.ready and valid_shape_m == len(rows) and "grouped_contiguous" in compute_config
        bounds = expert_layout.tolist()
        assert len(bounds) == self.options["num_experts"] + 1 and bounds[-1] == len(rows)
        parts = []
        for expert, (start, end) in enumerate(itertools.pairwise(bounds)):
            parts.append(rows[start:end] @ self.tensors["weight"][expert].T)
            if self.options["has_bias"]:
                parts[-1] += self.tensors["bias"][expert]
        return torch.cat(parts)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b"])
def test_humming_is_given_sorted_rows_and_where_experts_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[HummingLayer] = []
    schema = SimpleNamespace(quant_tensor=lambda part, schema, dtype: {"weight": part})
    make = SimpleNamespace(HummingLayer=lambda **options: made.append(HummingLayer(**options)) or made[-1])
    monkeypatch.setitem(sys.modules, "humming.layer", make)
    monkeypatch.setitem(sys.modules, "humming.schema", SimpleNamespace(HummingWeightSchema=schema))
    monkeypatch.setattr(rivals, "_BLOCK", 5 * 64 * 64)
    layer = small_layer(name)
    contender = contenders.humming(get_scheme("fp6_e3m2", 32), torch.bfloat16, Activations.E4M3)
    ways = contender.build(layer, 2)
    assert [copy.options["shape_n"] for copy in made] == [64, 64, 64, 64]
    assert made[0].options["weight_config"] == {"dtype": "float6e3m2", "group_size": 32}
    assert made[0].options["input_config"] == {"dtype": "float8e4m3"}
    x, logits = given(layer, 7)
    for copies in ways.values():
        for forward in copies:
            measure.check(forward(x, logits), expected(layer, x, logits), 0.02)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "deepseek-v3"])
def test_tersor_packs_and_runs_the_same_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ops, "preferred_layout", lambda scheme, dtype, device, kind: f"tiles_{target_of(Activations.of(kind), dtype)}"
    )
    layer = small_layer(name)
    contender = contenders.tersor(FP6, torch.bfloat16)
    with pytest.raises(UnfitError, match="no kernel takes all experts at once: "):
        contender.build(layer, 2)
    monkeypatch.setattr(contenders, "grouped", SimpleNamespace(obstacle=lambda x, gate_up, down: ""))
    (copies,) = contender.build(layer, 2).values()
    x, logits = given(layer, 3)
    y = expected(layer, x, logits)
    allowed = measure.allowed_error(layer, contender)
    assert 0.05 < allowed < 0.2
    for forward in copies:
        measure.check(forward(x, logits), y, allowed)
    with pytest.raises(UnfitError, match=r"its output is off by 1.* of the norm, where 0\.1"):
        measure.check(forward(x, logits.flip(-1)), y, allowed)
    with pytest.raises(UnfitError, match="off by nan"):
        measure.check(y * float("nan"), y, allowed)


def test_no_kernel_is_a_reason() -> None:
    contender = contenders.tersor(FP6, torch.bfloat16)
    with pytest.raises(UnfitError, match="no kernel serves fp6_e3m2"):
        contender.build(small_layer("olmoe"), 2)


def test_sizes_are_those_of_the_models() -> None:
    assert {name: geometry.experts * geometry.parameters for name, geometry in MODELS.items()} == {
        "qwen3-30b-a3b": 603979776,
        "mixtral-8x7b": 1409286144,
        "gpt-oss-20b": 796262400,
        "gpt-oss-120b": 3185049600,
        "deepseek-v3": 11274289152,
        "olmoe": 402653184,
    }
    assert MODELS["qwen3-30b-a3b"].packed_bytes(FP6) == 3 * 2048 * 768 * 6 // 8 + 2 * (2 * 768 + 2048)
    assert [layer.name for layer in resolve(["OLMoE", "mixtral-8x7b", "olmoe"])] == ["olmoe", "mixtral-8x7b"]
    with pytest.raises(InputError, match="no experts for 'qwen3', did you mean 'qwen3-30b-a3b'"):
        resolve(["qwen3"])


def test_enough_is_read_between_two_readings_of_an_expert() -> None:
    qwen = MODELS["qwen3-30b-a3b"]
    assert measure.copies(qwen, qwen.packed_bytes(FP6), calls=39) == 10
    assert measure.copies(qwen, qwen.packed_bytes(FP6), calls=4) == 4
    assert measure.copies(MODELS["deepseek-v3"], 2 * MODELS["deepseek-v3"].parameters, calls=9) == 2


def test_calls_have_logits_of_their_own_and_read_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = small_layer("qwen3-30b-a3b")
    monkeypatch.setattr(measure, "_READ", 5 * 4 * layer.geometry.parameters // 2)
    problem = measure.problem_of(layer, 1, seed=0)
    assert len(problem.logits) == 5 and problem.hit == 4
    assert not torch.equal(problem.logits[0], problem.logits[1])
    again = measure.problem_of(layer, 1, seed=0)
    assert torch.equal(problem.x, again.x) and torch.equal(problem.logits[4], again.logits[4])
    assert not torch.equal(problem.x, measure.problem_of(layer, 1, seed=1).x)
    many = measure.problem_of(layer, 50, seed=0)
    assert len(many.logits) == 2 and 31 < many.hit <= 32


def fake(name: str, *ways: str) -> Contender:
    """A contender that computes the layer in float32, in several ways."""

    def build(layer: Layer, copies: int) -> dict[str, list[Forward]]:
        def forward(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            return expected(layer, x, logits)

        return {way: [forward] * copies for way in ways}

    return Contender(name=name, dtype=torch.float32, expert_bytes=lambda geometry: 1000, build=build)


def times(*taken: float | str) -> Callable[[Calls], float]:
    """A clock that says these times in turn; a word is an error of another package."""
    left = list(taken)

    def microseconds(calls: Calls) -> float:
        calls[0]()
        time = left.pop(0)
        if isinstance(time, str):
            raise RuntimeError(time)
        return time

    return microseconds


def measured(contender: Contender, clock: Callable[[Calls], float], tokens: Sequence[int]) -> list[Row | Skipped]:
    """What one contender is found to take at a small layer."""
    (found,) = measure.measure([shrunk("olmoe")], tokens, [contender], clock, dtype=torch.float32, device=CPU)
    return found


@pytest.fixture
def little_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of two calls."""
    monkeypatch.setattr(measure, "_READ", 1)


def test_rows_come_in_order_and_the_first_time_is_thrown_away(little_is_read: None) -> None:
    found = measured(fake("torch", "a", "b"), times(99, 1, 2, "out of memory", 4), [1, 8])
    assert found[0] == Row(name="olmoe", n=1, kernel="torch", way="a", experts_hit=4.0, hit_bytes=4000, microseconds=1)
    assert [(row.n, row.way, row.microseconds) for row in found if isinstance(row, Row)] == [
        (1, "a", 1),
        (1, "b", 2),
        (8, "b", 4),
    ]
    assert found[2] == Skipped(name="olmoe", n=8, kernel="torch", way="a", why="RuntimeError: out of memory")


def test_an_error_of_tersor_itself_is_no_reason(little_is_read: None) -> None:
    with pytest.raises(RuntimeError, match="capture"):
        measured(fake("fp6_e3m2", ""), times("capture"), [1])


RESULT: dict[str, Any] = {
    "environment": {"gpu": "NVIDIA H200"},
    "dtype": "bfloat16",
    "seed": 0,
    "read_bandwidth": 4e12,
}


def row(kernel: str, way: str, microseconds: float, n: int = 1) -> dict[str, Any]:
    """A row of a results file."""
    nbytes = 120_000_000 if kernel == "torch" else 40_000_000
    return {
        "name": "olmoe",
        "n": n,
        "kernel": kernel,
        "way": way,
        "experts_hit": 8.0,
        "hit_bytes": nbytes,
        "microseconds": microseconds,
    }


def test_the_table_has_the_faster_of_a_rivals_ways() -> None:
    rows = [
        row("fp6_e3m2", "", 12.5),
        row("torch", "grouped_mm", 60.0),
        row("torch", "batched_mm", 50.0),
        row("compiled", "batched_mm", 30.0),
        row("humming fp6_e3m2", "grouped", 25.0),
        row("torch", "grouped_mm", 70.0, n=8),
    ]
    headings, cells = measure.columns({**RESULT, "rows": rows, "skipped": []})
    assert headings[5:8] == ["roofline us", "Tersor us", "of roofline"]
    assert headings[8:] == ["torch us", "compiled us", "humming us", "x torch", "x compiled", "x humming"]
    theirs = ["50.0", "30.0", "25.0", "4.00", "2.40", "2.00"]
    assert cells == [
        ["olmoe", "1", "fp6_e3m2", "8.0", "40.0", "10.0", "12.5", "80 %", *theirs],
        ["olmoe", "8", "fp6_e3m2", "8.0", "-", "-", "-", "-", "70.0", *["-"] * 5],
    ]
    alone = measure.columns({**RESULT, "rows": rows[:1], "skipped": []})
    assert alone[0][-1] == "of roofline"


def test_results_say_what_they_are(monkeypatch: pytest.MonkeyPatch, little_is_read: None) -> None:
    monkeypatch.setattr(report, "environment", lambda: {"gpu": "NVIDIA H200"})
    found = measured(fake("torch", "a"), times(9, 1), [1])
    result = measure.result(found, dtype="float16", seed=3, read_bandwidth=4e12)
    assert (result["kind"], result["version"], result["seed"]) == ("tersor bench experts", 1, 3)
    assert [row["kernel"] for row in result["rows"]] == ["torch"]
