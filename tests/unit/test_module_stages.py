"""Modules are cut into pipeline stages that balance, and nothing in them is lost or read from a later stage."""

from __future__ import annotations

import pytest
import torch
from helpers.graph_kinds import MODELS
from helpers.graph_models import Gpt, Mlp, Towers

from tersor.errors import InputError
from tersor.planner.graph.ir import Graph
from tersor.planner.graph.local import run
from tersor.planner.graph.moves import Axis, Ring
from tersor.planner.graph.pipeline import StagedPlan, plan_stages

ONE = (Axis("tensor", 1, Ring(1e-6, 1e11)),)


def computed(graph: Graph, known: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the outputs of a graph of these values."""
    known = {**graph.constants, **known}
    for operator in graph.operators:
        if operator.kind not in ("gradient", "update"):
            made = run(operator, [known[name] for name in operator.inputs])
            known.update(zip(operator.outputs, made, strict=True))
    return [known[name] for name in graph.outputs]


def check(plan: StagedPlan, module: torch.nn.Module) -> None:
    """Check that each operator is in a stage, and that a stage reads only the module's inputs and earlier stages."""
    made: set[str] = set(plan.graph.inputs)
    operators: set[str] = set()
    for number, stage in enumerate(plan.stages):
        graph = stage.plan.space.graph
        assert made.issuperset(graph.inputs), set(graph.inputs) - made
        made.update(stage.sends)
        assert all(number < to < len(plan.stages) for readers in stage.sends.values() for to in readers)
        operators.update(one.name for one in graph.operators if one.kind not in ("gradient", "update"))
    assert operators == {operator.name for operator in plan.graph.operators}
    held = [{value.path for value in stage.plan.space.graph.parameters} for stage in plan.stages]
    read = {value.path for value in plan.graph.parameters if plan.graph.users[value.name]}
    assert set().union(*held) == read <= dict(module.named_parameters(remove_duplicate=False)).keys()


@pytest.mark.parametrize("name", ["T5", "UNet"])
def test_a_model_in_stages_computes_what_it_computes_in_one(name: str) -> None:
    torch.manual_seed(0)
    module, args, kwargs = MODELS[name]()
    plan = plan_stages(module.eval(), args, kwargs, stages=2, mesh=ONE, parts=4)
    check(plan, module)
    values = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
    state = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    known = {value.name: state[value.path] for value in plan.graph.values.values() if value.path in state}
    known |= dict(zip(plan.graph.inputs, values, strict=True))
    with torch.no_grad():
        whole = computed(plan.graph, known)
        for stage in plan.stages:
            graph = stage.plan.space.graph
            known |= dict(zip(graph.outputs, computed(graph, known), strict=True))
    for one, output in zip(plan.graph.outputs, whole, strict=True):
        assert torch.equal(known[one], output)
    slow, fast = (choose(stage.seconds for stage in plan.stages) for choose in (max, min))
    assert slow < 1.5 * fast


def test_stages_of_equal_layers_hold_as_many_and_balance_the_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        module, ids = Gpt(1024, 2048, 16, 4, 1024), torch.zeros(1, 1024, dtype=torch.long)
    plan = plan_stages(module, (ids, ids), stages=4, mesh={"tensor": 2}, parts=8, train=True)
    check(plan, module)
    each = [stage.seconds for stage in plan.stages]
    assert max(each) < 1.25 * sum(each) / 4
    assert plan.seconds == pytest.approx(sum(each) + 7 * max(each))
    flying = [stage.held - stage.plan.held[0] for stage in plan.stages]
    assert flying[0] > 2.5 * flying[2] > 0 == flying[3], "an earlier stage has more micro-batches in flight"
    plan.show()
    shown = capsys.readouterr().out
    assert "4 stages, 8 micro-batches: " in shown and "hands on" in shown
    with pytest.raises(InputError, match=r"stage 0 of 4 needs .* with 4 micro-batches in flight: .* missing"):
        room = plan.stages[0].held - flying[2] / 2
        plan_stages(module, (ids, ids), stages=4, mesh={"tensor": 2}, parts=8, train=True, memory=room)


def test_towers_beside_each_other_are_stages_beside_each_other_and_share_a_weight() -> None:
    ids = torch.zeros(2, 8, dtype=torch.long)
    plan = plan_stages(Towers(64, 32, 4, 8), (ids, ids), stages=2, mesh=ONE, parts=4, train=True)
    check(plan, Towers(64, 32, 4, 8))
    held = [{value.path for value in stage.plan.space.graph.parameters} for stage in plan.stages]
    assert held[0] & held[1] == {"tokens.weight"}


def test_what_cannot_be_cut_into_stages_is_said() -> None:
    rows = torch.zeros(8, 4)
    with pytest.raises(InputError, match="2 blocks of operators cannot be cut into 3 stages"):
        plan_stages(Mlp(4, 8, 4), (rows,), stages=3, mesh=ONE)
    with pytest.raises(InputError, match="0 stages and 1 micro-batches: there is at least one of each"):
        plan_stages(Mlp(4, 8, 4), (rows,), stages=0, mesh=ONE)
