"""One call plans any module, says what it found, and how far from the best that may be."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from helpers.graph_kinds import MODELS, traced
from helpers.graph_models import Gpt, Mlp

import tersor
from tersor.errors import InputError
from tersor.hardware import chip_named
from tersor.planner.graph.moves import Axis, Ring, held
from tersor.planner.graph.plan import plan_graph
from tersor.planner.graph.priced import mesh_of
from tersor.planner.graph.problem import space
from tersor.planner.graph.roofline import Roofline
from tersor.planner.graph.subgroups import split_meshes
from tersor.planner.graph.trace import trace
from tersor.planner.graph.training import training
from tersor.planner.links import of_chip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_planned_in_one_call_and_the_plan_is_the_best(name: str) -> None:
    graph = traced(name)[-1]
    for planned in (graph, training(graph)):
        plan = plan_graph(planned, {"tensor": 2})
        assert plan.found.gap == 0.0 and plan.found.bound <= plan.seconds <= plan.alone
        assert plan.space.problem.seconds(plan.choice) == pytest.approx(plan.seconds)
        assert 0 < plan.held[0] <= plan.room == 0.95 * plan.chip.memory_bytes
        assert len(plan.choice) == len(plan.space.problem.blocks)


def test_a_plan_is_shown_with_its_time_bytes_bound_cuts_and_exchanges(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        module, ids = Gpt(50304, 4096, 32, 2, 128).to(torch.bfloat16), torch.zeros(1, 128, dtype=torch.long)
    plan = tersor.plan_module(module, (ids,), mesh={"tensor": 8})
    plan.show()
    shown = capsys.readouterr().out
    for words in (
        "inference on 8 tensor of NVIDIA H200: ",
        " times as fast as one device",
        "gap at most 0.00 % (elimination",
        " a rank, most while ",
        "layers.0.up:linear_2",
        "tensor:out.1",
        "all-reduce",
    ):
        assert words in shown, words
    assert f"{plan.seconds * 1e3:.3f} ms a step" in shown
    steps = plan.tables()[1][2]
    assert sum(float(row[-1]) for row in steps) == pytest.approx(
        1e3 * sum(step.seconds for _, step in plan.space.steps(plan.choice)), abs=2e-3
    )


def test_the_full_search_proves_what_the_fast_one_finds() -> None:
    graph = traced("UNet")[-1]
    fast, full = (plan_graph(graph, {"tensor": 2}, search=name) for name in ("fast", "full"))
    assert full.seconds == pytest.approx(fast.seconds, rel=1e-4) and full.found.gap <= 1e-4
    drawn = plan_graph(graph, {"tensor": 2}, search="random")
    assert drawn.seconds >= fast.seconds and "how far from the best is not known" in drawn.summary()[1]
    assert math.isinf(drawn.found.bound)


def test_a_vocabulary_that_ranks_do_not_divide_is_cut_and_costs_its_largest_part() -> None:
    rows, seconds = torch.zeros(1, 128, dtype=torch.long), {}
    for vocabulary in (50256, 50257, 50264):
        with torch.device("meta"):
            module = Gpt(vocabulary, 4096, 32, 1, 128).to(torch.bfloat16)
            plan = tersor.plan_module(module, (rows,), mesh={"tensor": 8})
        chosen = plan.space.chosen(plan.choice)
        assert chosen["head:linear_4"].name == "tensor:out"
        if vocabulary == 50257:
            weight = plan.space.graph.values["p_head_weight"]
            places = chosen["head:linear_4"].stored["p_head_weight"]
            assert held(weight.bytes, places, plan.space.mesh, weight.parts) == pytest.approx(6283 * 4096 * 2)
        seconds[vocabulary] = plan.seconds
    assert seconds[50256] < seconds[50257] == pytest.approx(seconds[50264], rel=1e-3)


def test_ranks_that_are_more_than_heads_of_keys_share_them_in_subgroups() -> None:
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=1024,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    ids = torch.zeros(64, 64, dtype=torch.long, device="meta")
    graph = trace(module, (ids,))
    meshes = split_meshes(graph, mesh_of({"tensor": 8}, of_chip(chip_named("h200"))))
    assert [[(axis.name, axis.ranks) for axis in mesh] for mesh in meshes] == [
        [("tensor", 8)],
        [("tensor.heads", 2), ("tensor.group", 4)],
    ]
    ways = space(graph, meshes[1], Roofline(chip_named("h200")), every=True)
    block = next(block for block in ways.problem.blocks if "attention" in block.name)
    assert "tensor.heads:heads.0 tensor.group:heads.1" in block.options
    assert plan_graph(graph, {"tensor": 8}).seconds <= plan_graph(graph, meshes[0]).seconds


def test_axes_of_a_mesh_have_the_links_that_join_their_ranks() -> None:
    graph = training(traced("GPT")[-1])
    near, far = plan_graph(graph, {"data": 2, "tensor": 8}).space.mesh
    assert near.links.all_reduce(1e6, 2) > far.links.all_reduce(1e6, 8) / 2
    assert near.links.nodes(2) == (1, 1) and far.links.nodes(8) == (8,)
    assert far.links.send(1e6) < near.links.send(1e6)


def test_a_module_that_fits_nowhere_and_names_that_nothing_has_are_one_line() -> None:
    with torch.device("meta"):
        module, rows = Mlp(64, 64, 64), torch.zeros(8, 64)
    with pytest.raises(InputError, match=r"missing$") as caught:
        tersor.plan_module(module, (rows,), mesh={"tensor": 2}, memory=1000)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a mesh needs at least one axis"):
        tersor.plan_module(module, (rows,), mesh={})
    with pytest.raises(InputError, match=r"no search 'fats'.*fast"):
        tersor.plan_module(module, (rows,), mesh={"tensor": 2}, search="fats")
    axes = (Axis("tensor", 2, Ring(1e-6, 1e9)),)
    assert tersor.plan_module(module, (rows,), mesh=axes, train=True).space.mesh is axes
