"""Modules that are spread over processes compute and train as the whole module does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.graph_models import Mlp
from helpers.graph_processes import distances
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tersor.errors import InputError, LostError
from tersor.hardware import chip_named
from tersor.nn.spread import Spread
from tersor.nn.staged import Staged
from tersor.ops.placed import Line, Mover
from tersor.planner.graph.ir import SUM, WHOLE
from tersor.planner.graph.moves import Axis, Moves, Ring
from tersor.planner.graph.pipeline import plan_stages
from tersor.planner.graph.problem import Space, space
from tersor.planner.graph.roofline import Roofline
from tersor.planner.graph.trace import trace
from tersor.planner.graph.training import training
from tersor.planner.problem import Choice

CASES = (
    "gpt megatron",
    "gpt row0+weights batch0 row0 dim0",
    "gpt random",
    "unet random",
    "mlp row0+state",
    "odd megatron",
    "stages unet 2",
)
BOTH = ("mlp random", "gpt random", "odd random", "stages skips 4", "stages towers 2")


def test_two_processes_train_as_one_whatever_the_plan(tmp_path: Path) -> None:
    found = distances((2,), CASES, tmp_path)
    assert len(found) == 2 * len(CASES)
    for one in found:
        assert max(one.outputs, one.gradients, one.parameters) < 1e-5, one
    shares = {one.case: one.share for one in found}
    assert shares["gpt row0+weights batch0 row0 dim0"] < 0.6
    assert shares["mlp row0+state"] == pytest.approx(0.5)
    cuts = next(one.cut for one in found if one.case == "odd megatron")
    skips = next(one.cut for one in found if one.case == "stages unet 2")
    assert len(skips) >= 3, "what skips over the bottom of a UNet goes from stage to stage"
    assert sum("out.1" in cut or "vocabulary" in cut for cut in cuts) == 2, "five heads and a vocabulary of 53 are cut"


def test_four_processes_on_two_axes_train_as_one(tmp_path: Path) -> None:
    found = distances((2, 2), BOTH, tmp_path)
    assert len(found) == 4 * len(BOTH)
    for one in found:
        assert max(one.outputs, one.gradients, one.parameters) < 1e-5, one
    skips = next(one.cut for one in found if one.case == "stages skips 4")
    assert any("3" in words.split(" to ")[1] for words in skips if "2" not in words.split(" to ")[1]), (
        "values go past stages"
    )
    towers = [one.share for one in found if one.case == "stages towers 2"]
    assert max(towers) < 0.5, "each stage is cut in two"


@contextmanager
def pretended(rank: int, ranks: int) -> Iterator[None]:
    """Be one of many ranks that do not exist."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def planned(module: torch.nn.Module, rows: int, width: int, mesh: tuple[Axis, ...]) -> Space:
    """Return the space of a training step of a module."""
    device = next(module.parameters()).device
    graph = training(trace(module, (torch.zeros(rows, width, device=device),)))
    return space(graph, mesh, Roofline(chip_named("h200")), every=True)


@pytest.mark.parametrize("rank", [0, 8191, 16383])
def test_a_rank_of_thousands_has_its_part_and_no_more(rank: int) -> None:
    links = Ring(1e-6, 1e11)
    with torch.device("meta"):
        module = Mlp(4096, 16384, 4096)
    ways = planned(module, 32768, 4096, (Axis("data", 2048, links), Axis("tensor", 8, links)))
    names = ("data:row0+weights tensor:out", "data:row0 tensor:in>whole")
    choice = {}
    for block, name in zip(ways.problem.blocks, names, strict=True):
        choice[block.name] = next(index for index, option in enumerate(block.options) if option.startswith(name))
    with pretended(rank, 16384):
        mine = Spread(
            module, ways, Choice(choice), init_device_mesh("cpu", (2048, 8), mesh_dim_names=("data", "tensor"))
        )
        shapes = [tuple(parameter.shape) for parameter in mine.parameters()]
    assert shapes == [(1, 4096), (4096, 2048)]


def test_a_mesh_or_inputs_that_a_plan_is_not_for_are_refused() -> None:
    module = Mlp(4, 8, 4)
    ways = planned(module, 8, 4, (Axis("data", 2, Ring(1e-6, 1e11)),))
    choice = Choice({block.name: 0 for block in ways.problem.blocks})
    with pretended(0, 4):
        with pytest.raises(InputError, match=r"the plan is for a mesh of \[2\] ranks, and this one has \[4\]"):
            Spread(module, ways, choice, init_device_mesh("cpu", (4,)))
        mine = Spread(module, ways, choice, init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "data"))["data"])
        with pytest.raises(InputError, match=r"the plan is for inputs of \[\[8, 4\]\], not \[\[7, 4\]\]"):
            mine(torch.zeros(7, 4))
        assert mine(torch.zeros(8, 4)) == module(torch.zeros(8, 4))


def test_a_pipeline_refuses_a_mesh_or_inputs_that_it_is_not_for_and_plans_that_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = ["another plan"]

    def gathered(found: list[Any], own: object) -> None:
        found[:] = [own, *others] if others else [own] * len(found)

    monkeypatch.setattr(distributed, "all_gather_object", gathered)
    axes = (Axis("tensor", 1, Ring(1e-6, 1e11)),)
    module = Mlp(4, 8, 4)
    plan = plan_stages(module, (torch.zeros(8, 4),), stages=2, mesh=axes)
    with pretended(0, 2):
        with pytest.raises(InputError, match=r"for a mesh of \[2, 1\] named axes, and this one has \[2\]"):
            Staged(module, plan, init_device_mesh("cpu", (2,), mesh_dim_names=("stage",)))
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("stage", "tensor"))
        with pytest.raises(InputError, match=r"^rank 1 has another plan than rank 0: make it once"):
            Staged(module, plan, mesh)
        others.clear()
        mine = Staged(module, plan, mesh)
        assert [tuple(one.shape) for one in mine.parameters()] == [(8, 4)] and not mine.last
        with pytest.raises(InputError, match="the plan is for 1 inputs, and 2 are given"):
            mine((torch.zeros(8, 4), torch.zeros(8, 4)))


def test_a_rank_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Connection closed by peer [10.0.0.2]:1234\nmore of it")

    with pretended(0, 2):
        monkeypatch.setattr(distributed, "all_reduce", broken)
        mover = Mover([Line(distributed.group.WORLD, 0, 2)], Moves((Axis("tensor", 2, Ring(1e-6, 1e9)),)))
        with pytest.raises(
            LostError, match=r"^a rank of the plan cannot be reached: Connection closed by peer"
        ) as caught:
            mover.move(torch.ones(4), (SUM,), (WHOLE,), ((4,),))
    assert "\n" not in str(caught.value)
