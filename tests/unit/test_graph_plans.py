"""Problems made of graphs have the plans that experts know as their best ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers.graph_models import Gpt, Mixture, Mlp
from helpers.graph_search import best, brute

from tersor.errors import InputError
from tersor.hardware import chip_named
from tersor.planner.graph import problem
from tersor.planner.graph.copies import moved_bytes
from tersor.planner.graph.ir import SUM, WHOLE, Graph, cut
from tersor.planner.graph.moves import Axis, Moves, Ring
from tersor.planner.graph.plan import plan_graph
from tersor.planner.graph.problem import Space, space
from tersor.planner.graph.roofline import Roofline
from tersor.planner.graph.trace import trace
from tersor.planner.graph.training import SGD, training
from tersor.planner.problem import Choice, Problem

H200 = Roofline(chip_named("h200"))


@dataclass(frozen=True)
class OneShot:
    """Links on which every collective starts once, so that one of twice the bytes beats two."""

    latency: float = 8e-6
    bandwidth: float = 450e9

    def all_reduce(self, size: float, ranks: int) -> float:
        return self.latency + 2 * (ranks - 1) / ranks * size / self.bandwidth

    def all_gather(self, size: float, ranks: int) -> float:
        return self.latency + (ranks - 1) / ranks * size / self.bandwidth

    reduce_scatter = all_to_all = all_gather


@functools.cache
def gpt(rows: int, batch: int = 1, *, trained: bool = False) -> Graph:
    """Two blocks of the width of a 7B model."""
    with torch.device("meta"):
        module = Gpt(50304, 4096, 32, 2, rows).to(torch.bfloat16)
        ids = torch.zeros(batch, rows, dtype=torch.long)
        graph = trace(module, (ids, ids) if trained else (ids,))
    return training(graph) if trained else graph


def priced(of: Problem, price: float) -> Problem:
    """The problem with a price in seconds on each byte of the fullest moment, where limits would be in the way."""
    blocks = (replace(block, seconds=block.seconds + price * block.bytes.max(axis=1)) for block in of.blocks)
    return replace(of, blocks=tuple(blocks))


def ways_of(spread: Space, choice: Choice, layer: int) -> dict[str, str]:
    """Return the ways of a layer's products and attention."""
    chosen = spread.chosen(choice)
    names = {
        name.split(":")[0].rsplit(".", 1)[-1]: option.name for name, option in chosen.items() if f"s.{layer}." in name
    }
    attention = next(option.name for name, option in chosen.items() if "attention" in name and f"s.{layer}:" in name)
    return {**names, "attention": attention}


def kinds(spread: Space, choice: Choice, *, least: float = 1e5) -> list[str]:
    """Return the kinds of collectives of at least so many bytes."""
    return [step.kind for _, step in spread.steps(choice) if step.bytes >= least]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_gpt_is_cut_as_megatron_cuts_it_with_one_all_reduce_a_half_block(ranks: int) -> None:
    spread = space(gpt(128), (Axis("tensor", ranks, OneShot()),), H200)
    choice = best(spread.problem)
    for layer in (0, 1):
        ways = ways_of(spread, choice, layer)
        assert ways == {
            "qkv": "tensor:out.1",
            "attention": "tensor:heads",
            "o": "tensor:in.0",
            "up": "tensor:out",
            "down": "tensor:in",
        }
    of_layers = [step.kind for flow, step in spread.steps(choice) if not flow.value.startswith("embedding")]
    assert of_layers == ["all_reduce"] * 4
    chosen = spread.chosen(choice)
    assert chosen["head:linear_8"].name == "tensor:out", "the vocabulary of the head is cut"


def test_queries_keys_and_values_in_one_product_are_cut_by_heads_in_three_runs() -> None:
    graph = gpt(128)
    value = graph.values["linear"]
    assert value.parts[-1] == (3, 32, 128)
    assert value.blocks(cut(2, 1)) == 3
    assert graph.values["linear_2"].blocks(cut(2, 0)) == 1


def test_training_reduces_once_a_half_block_on_the_way_back_too() -> None:
    spread = space(gpt(128, trained=True), (Axis("tensor", 8, OneShot()),), H200)
    choice = best(spread.problem)
    assert ways_of(spread, choice, 0)["up"] == "tensor:out"
    back = [
        (flow.value.split(" by ")[0], step.kind)
        for flow, step in spread.steps(choice)
        if flow.value.startswith("gradient of layer_norm")
    ]
    norms = ["layer_norm", *(f"layer_norm_{index}" for index in range(1, 5))]
    assert sorted(back) == sorted((f"gradient of {name}", "all_reduce") for name in norms)


def test_long_sequences_scatter_and_gather_where_short_ones_reduce() -> None:
    mesh = (Axis("tensor", 8, OneShot()),)
    short = space(gpt(128, trained=True), mesh, H200, memory=1e12)
    long = space(gpt(4096, trained=True), mesh, H200, memory=1e12)
    few, many = (best(priced(spread.problem, 1e-12)) for spread in (short, long))
    assert "reduce_scatter" not in kinds(short, few) and "all_reduce" in kinds(short, few)
    assert "all_reduce" not in kinds(long, many) and "reduce_scatter" in kinds(long, many)
    assert ways_of(long, many, 0)["up"] == "tensor:out", "products are cut as before"
    assert sum("dim1" in option.name for option in long.chosen(many).values()) >= 4, "sums and norms are cut by rows"


def test_many_rows_are_cut_and_few_are_not_where_weights_fit() -> None:
    mesh = (Axis("tensor", 8, OneShot()),)
    few, many = space(gpt(128), mesh, H200), space(gpt(8192), mesh, H200)
    assert ways_of(few, best(few.problem), 1)["up"] == "tensor:out"
    rows = ways_of(many, best(many.problem), 1)
    assert rows == {**dict.fromkeys(("qkv", "o", "up", "down"), "tensor:row1"), "attention": "tensor:heads"}
    assert set(kinds(many, best(many.problem))) == {"all_to_all"}


def test_data_goes_over_the_slow_axis_and_heads_over_the_fast_one() -> None:
    mesh = (Axis("node", 2, OneShot(30e-6, 12.5e9)), Axis("gpu", 4, OneShot(3e-6, 450e9)))
    spread = space(gpt(128, 4), mesh, H200)
    choice = best(spread.problem)
    for layer in (0, 1):
        ways = ways_of(spread, choice, layer)
        assert ways["attention"] == "node:batch0 gpu:heads"
        assert ways["up"] == "node:row0 gpu:out"
    assert {step.axis for _, step in spread.steps(choice)} == {1}


def mlp(rows: int, *, every: bool = False) -> Space:
    """A training step of two linears on eight ranks."""
    with torch.device("meta"):
        graph = training(trace(Mlp(1024, 4096, 1024), (torch.zeros(rows, 1024),)))
    return space(graph, (Axis("data", 8, OneShot()),), H200, memory=1e12, every=every)


def test_many_rows_train_by_data_with_state_cut_and_with_weights_cut_where_memory_is_dear() -> None:
    few, many = mlp(64), mlp(65536)
    names = [option.name for option in few.chosen(best(few.problem)).values()]
    assert names[0] == "data:out" and names[1].startswith("data:in")
    names = [option.name for option in many.chosen(best(many.problem)).values()]
    assert names == ["data:row0+state"] * 2
    choice = best(priced(many.problem, 1e-11))
    assert [option.name for option in many.chosen(choice).values()] == ["data:row0+weights"] * 2
    assert many.held(choice)[0] < many.held(best(many.problem))[0]
    gathers = [flow.value for flow, step in many.steps(choice) if step.kind == "all_gather"]
    assert sorted(gathers) == ["p_linears_0_weight", "p_linears_0_weight", "p_linears_1_weight", "p_linears_1_weight"]


def test_a_limit_of_memory_cuts_weights_and_one_that_is_too_small_leaves_nothing() -> None:
    with torch.device("meta"):
        graph = training(trace(Mlp(256, 256, 256), (torch.zeros(65536, 256),)))
    mesh = (Axis("data", 8, OneShot()),)
    free = space(graph, mesh, H200, memory=1e12)
    choice = brute(free.problem)
    assert choice == best(free.problem)
    most = free.held(choice, moves=False)[0]
    assert free.problem.bytes(choice).max() == pytest.approx(most)
    tight = space(graph, mesh, H200, memory=most - 1)
    other = brute(tight.problem)
    assert other is not None and other != choice
    assert tight.held(other, moves=False)[0] < most
    assert brute(space(graph, mesh, H200, memory=1e4).problem) is None


def test_copies_and_buffers_of_moves_are_counted_where_they_are() -> None:
    spread, weight = mlp(65536, every=True), 1024 * 4096 * 4

    def moving(option: str) -> dict[str, float]:
        choice = Choice({block.name: block.options.index(option) for block in spread.problem.blocks})
        more = moved_bytes(spread.graph, spread.flows, spread.chosen(choice), Moves(spread.mesh))
        names = [operator.name for operator in spread.graph.operators]
        assert spread.held(choice)[0] >= spread.held(choice, moves=False)[0]
        return {name: size for name, size in zip(names, more, strict=True) if size}

    gathered = moving("data:row0+weights")
    assert gathered["linear"] == gathered["linear_1"] == 2 * weight, "the weight, and the pieces that it was made of"
    back = gathered["gradient of linear_1"]
    assert back == 3 * weight, "the weight again, its gradient's addend, and the pieces of one of them"
    assert "relu" not in gathered
    summed = moving("data:row0")
    assert summed["gradient of linear_1"] == weight, "an addend that is reduced where it lies"
    assert "linear" not in summed


def test_a_plan_whose_copies_do_not_fit_is_searched_again_with_less_room() -> None:
    with torch.device("meta"):
        graph = training(trace(Mlp(1024, 4096, 1024), (torch.zeros(8192, 1024),)))
    free = plan_graph(graph, {"data": 8})
    room = free.held[0] * 0.9
    once = space(graph, free.space.mesh, H200, memory=room)
    choice = brute(once.problem)
    assert choice is not None
    assert once.held(choice)[0] > room >= once.held(choice, moves=False)[0], "it fits but for its copies"
    plan = plan_graph(graph, {"data": 8}, memory=room)
    assert plan.held[0] <= room and plan.seconds > once.problem.seconds(choice)


def test_experts_lie_on_different_ranks() -> None:
    with torch.device("meta"):
        graph = trace(Mixture(1024, 4096, 8, 64).to(torch.bfloat16), (torch.zeros(512, 1024, dtype=torch.bfloat16),))
    spread = space(graph, (Axis("expert", 8, OneShot()),), H200, memory=1e12)
    chosen = spread.chosen(best(priced(spread.problem, 1e-11)))
    parameters = {
        graph.values[name].path: places for option in chosen.values() for name, places in option.stored.items()
    }
    assert parameters["up"] == parameters["down"] == (cut(0),)


def test_blocks_of_many_operators_lose_less_than_a_hundredth_against_one_an_operator() -> None:
    with torch.device("meta"):
        graph = trace(Gpt(512, 256, 8, 1, 64), (torch.zeros(2, 64, dtype=torch.long),))
    for links in (OneShot(), OneShot(1e-6, 1e9), Ring(1e-7, 4e12)):
        mesh = (Axis("tensor", 4, links),)
        folded, single = space(graph, mesh, H200), space(graph, mesh, H200, fold=False)
        assert len(folded.problem.blocks) < len(single.problem.blocks) / 2
        least = single.problem.seconds(best(single.problem))
        assert least * 0.999999 <= folded.problem.seconds(best(folded.problem)) <= least * 1.01


def test_layers_that_are_equal_are_tied() -> None:
    spread = space(gpt(128), (Axis("tensor", 2, OneShot()),), H200)
    ties = [block.tie for block in spread.problem.blocks if block.tie]
    assert len(ties) == 14 and len(set(ties)) == 7


def test_layers_of_one_form_cost_what_they_cost_counted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        ids = torch.zeros(4, 16, dtype=torch.long)
        graph = training(trace(Gpt(64, 32, 4, 3, 16), (ids, ids)))
    mesh = (Axis("tensor", 4, OneShot()),)
    shared = space(graph, mesh, H200, memory=1e12).problem
    monkeypatch.setattr(problem, "form_of", lambda graph, group: group.name)
    single = space(graph, mesh, H200, memory=1e12).problem
    for one, other in zip(shared.blocks, single.blocks, strict=True):
        assert one.options == other.options
        assert np.allclose(one.seconds, other.seconds, rtol=1e-12) and np.array_equal(one.bytes, other.bytes)
    for link, twin in zip(shared.edges, single.edges, strict=True):
        assert (link.source, link.target) == (twin.source, twin.target)
        assert np.allclose(link.seconds, twin.seconds, rtol=1e-12)


def test_nothing_that_a_plan_hands_on_is_a_sum_that_nobody_adds() -> None:
    for graph in (gpt(128), gpt(128, trained=True)):
        spread = space(graph, (Axis("tensor", 8, OneShot()),), H200)
        chosen = spread.chosen(best(spread.problem))
        homes = {name: option for option in chosen.values() for name in option.ways}
        for operator in graph.operators:
            if operator.kind in ("update", "gradient") or operator.name not in homes:
                continue
            places = [homes[operator.name].places(graph, operator, place)[0] for place in range(len(operator.operands))]
            pending = {place for place, where in enumerate(places[: len(operator.inputs)]) if where == SUM}
            allowed = [set(group) for group in operator.linear] + [set(operator.addends), set()]
            assert pending in allowed, operator.name


@pytest.mark.parametrize("trained", [False, True])
def test_seconds_of_a_choice_are_those_of_its_operators_and_collectives(trained: bool) -> None:
    with torch.device("meta"):
        ids = torch.zeros(4, 64, dtype=torch.long)
        graph = trace(Gpt(512, 256, 8, 1, 64), (ids, ids))
    graph = training(graph) if trained else graph
    mesh = (Axis("data", 2, OneShot()), Axis("tensor", 2, OneShot(1e-6, 1e9)))
    nothing = Ring(0.0, float("inf"))
    spread, alone = (space(graph, axes, H200) for axes in (mesh, tuple(replace(a, links=nothing) for a in mesh)))
    generator = np.random.default_rng(0)
    by_name = [{option.name: option for option in alone.options[block.name]} for block in spread.problem.blocks]
    for _ in range(20):
        choice = {}
        for block, options in zip(spread.problem.blocks, by_name, strict=True):
            shared = [index for index, name in enumerate(block.options) if name in options]
            choice[block.name] = int(generator.choice(shared))
        picked = Choice(choice)
        other = Choice(
            {
                block.name: next(
                    index
                    for index, option in enumerate(alone.options[block.name])
                    if option.name == block.options[choice[block.name]]
                )
                for block in spread.problem.blocks
            }
        )
        moved = sum(step.seconds for _, step in spread.steps(picked))
        assert spread.problem.seconds(picked) == pytest.approx(alone.problem.seconds(other) + moved, rel=1e-9)


def test_moves_take_the_cheapest_order_of_axes() -> None:
    slow, fast = OneShot(0.0, 1.0), OneShot(0.0, 100.0)
    moves = Moves((Axis("slow", 2, slow), Axis("fast", 4, fast)))
    steps = moves.between(800, (SUM, SUM), (WHOLE, cut(0)))
    assert [(step.kind, step.axis, step.bytes) for step in steps] == [
        ("reduce_scatter", 1, 800),
        ("all_reduce", 0, 200),
    ]
    assert moves.between(800, (WHOLE, WHOLE), (cut(1), SUM)) == ()
    gather = moves.between(800, (cut(0), cut(1)), (WHOLE, cut(1)))
    assert [(step.kind, step.bytes, step.seconds) for step in gather] == [("all_gather", 200, 100.0)]
    assert [step.kind for step in moves.between(800, (cut(0), WHOLE), (cut(1), WHOLE))] == ["all_to_all"]


def test_a_ring_adds_up_its_steps() -> None:
    ring = Ring(latency=1.0, bandwidth=10.0)
    assert ring.all_gather(80.0, 4) == ring.reduce_scatter(80.0, 4) == 3 * (1.0 + 2.0)
    assert ring.all_reduce(80.0, 4) == 18.0
    assert ring.all_to_all(80.0, 4) == 9.0


def test_what_cannot_be_trained_or_spread_is_said() -> None:
    with torch.device("meta"):
        graph = trace(torch.nn.ReLU(), (torch.zeros(4, 4),))
    with pytest.raises(InputError, match="no parameter reaches a floating-point output: there is nothing to train"):
        training(graph)
    with pytest.raises(InputError, match="a mesh needs at least one axis"):
        space(graph, (), H200)


def test_an_optimiser_with_less_state_leaves_more_memory() -> None:
    with torch.device("meta"):
        graph = training(trace(Mlp(64, 64, 64), (torch.zeros(8, 64),)))
    mesh = (Axis("data", 2, OneShot()),)
    adam, sgd = space(graph, mesh, H200), space(graph, mesh, H200, optimiser=SGD)
    whole = Choice({block.name: 0 for block in adam.problem.blocks})
    assert adam.held(whole)[0] - sgd.held(whole)[0] == 2 * 64 * 64 * 8
    assert np.isclose(adam.problem.seconds(whole), sgd.problem.seconds(whole))
