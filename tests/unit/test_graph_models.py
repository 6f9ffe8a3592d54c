"""Modules of every kind become graphs without a word from the user, for inference and for training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.graph_kinds import MODELS, traced
from helpers.graph_search import best
from torch import nn

from tersor.errors import InputError
from tersor.hardware import chip_named
from tersor.planner.graph.cuts import ways
from tersor.planner.graph.ir import Graph
from tersor.planner.graph.local import run
from tersor.planner.graph.moves import Axis, Ring
from tersor.planner.graph.problem import space
from tersor.planner.graph.roofline import Roofline
from tersor.planner.graph.trace import trace
from tersor.planner.graph.training import training

WITHOUT_RULE = {"Mixtral": {"aten.histc.default"}}
"""Operators that have no rule, by model: counting tokens of an expert."""


def evaluate(graph: Graph, module: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs of a graph, computed operator by operator."""
    known = dict(graph.constants)
    state = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    known.update({value.name: state[value.path] for value in graph.values.values() if value.path in state})
    known.update(zip(graph.inputs, inputs, strict=True))
    for operator in graph.operators:
        made = run(operator, [known[name] for name in operator.inputs])
        known.update(zip(operator.outputs, made, strict=True))
    return [known[name] for name in graph.outputs]


def tensors(items: Any) -> list[torch.Tensor]:
    """Return the tensors among nested inputs or outputs, in order."""
    if isinstance(items, torch.Tensor):
        return [items]
    if isinstance(items, dict):
        items = list(items.values())
    return [tensor for item in items for tensor in tensors(item)] if isinstance(items, (list, tuple)) else []


@pytest.mark.parametrize("name", MODELS)
def test_a_model_traces_and_its_operators_compute_what_it_computes(name: str) -> None:
    module, args, kwargs, graph = traced(name)
    assert {note.split("no rule for ")[1].split(",")[0] for note in graph.notes} == WITHOUT_RULE.get(name, set())
    with torch.no_grad():
        found = evaluate(graph, module, tensors([args, kwargs]))
        expected = module(*args, **kwargs)
    expected = tensors(expected if not hasattr(expected, "to_tuple") else expected.to_tuple())
    assert torch.allclose(found[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_planned_for_inference_and_training(name: str) -> None:
    graph = traced(name)[-1]
    roofline, mesh = Roofline(chip_named("h200")), (Axis("tensor", 2, Ring(1e-6, 450e9)),)
    whole = max(value.bytes for value in graph.parameters)
    for planned in (graph, training(graph)):
        spread = space(planned, mesh, roofline, memory=1e12)
        choice = best(spread.problem)
        alone = {block.name: 0 for block in spread.problem.blocks}
        assert spread.problem.seconds(choice) <= spread.problem.seconds(alone) < float("inf")
        assert spread.held(choice)[0] > whole / 2
        assert spread.problem.limits


@pytest.mark.parametrize("name", ["GPT-2", "BERT", "T5", "ViT", "Mixtral"])
def test_heads_of_attention_can_be_cut_through_all_views(name: str) -> None:
    graph = traced(name)[-1]
    attention = [operator for operator in graph.operators if operator.kind == "attention"]
    assert len(attention) == (6 if name == "T5" else 2)
    for operator in attention:
        names = [way.name for way in ways(operator, 2)]
        assert any(name.startswith("heads") for name in names)
        maker = graph.makers[operator.inputs[0]]
        while maker.kind != "matmul":
            maker = graph.makers[maker.inputs[0]]
        parts = graph.values[maker.outputs[0]].parts[-1]
        assert 4 in parts or parts[:2] == (2, 2), "the product's output is not known to be heads of something"


def test_a_norm_with_statistics_of_the_batch_keeps_it_whole() -> None:
    module, args, _ = MODELS["Wide-ResNet"]()
    for training_mode in (True, False):
        norms = [one for one in trace(module.train(training_mode), args).operators if one.kind == "norm"]
        assert norms
        for operator in norms:
            names = {way.name for way in ways(operator, 2)}
            assert "channels" in names and ("batch" in names) != training_mode


def test_a_module_that_cannot_be_traced_is_one_clear_line() -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum().item() > 0 else x

    with pytest.raises(InputError, match=r"^cannot trace Asks: ") as caught:
        trace(Asks(), (torch.ones(3),))
    assert "\n" not in str(caught.value)


def test_a_size_that_depends_on_data_is_named() -> None:
    class Finds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.nonzero()

    with pytest.raises(InputError, match=r"cannot plan nonzero: its sizes \[.*, 1\] depend on data"):
        trace(Finds(), (torch.ones(3),))


@torch.library.custom_op("graphtest::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """An operator that no rule knows."""
    return 2 * x


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_an_unknown_operator_is_named_with_its_module_and_replicated_at_its_cost() -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), Twice())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    graph = trace(Custom(), (torch.zeros(4, 8),))
    assert graph.notes == (
        "twice: no rule for graphtest.twice.default, so that every rank computes all of it (in inner.1)",
    )
    spread = space(graph, (Axis("tensor", 2, Ring(1e-6, 1e9)),), Roofline(chip_named("h200")))
    block = next(block for block in spread.problem.blocks if block.name == "inner.1:twice")
    assert block.options == ("tensor:whole",)
    assert block.seconds[0] > 0
