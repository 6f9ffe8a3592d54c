"""A module's graph in pipeline stages: which blocks are in which, what goes between them, and what a step takes.

Blocks are costed by the plan of the whole graph on one stage's mesh. Stages of blocks in order are the optimum of
`stages`, where what a cut hands on takes time; `stage_graph` also finds stages that are no spans of the order (an
encoder beside a decoder). The better one is planned stage by stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tersor.errors import InputError, UnsupportedError
from tersor.hardware import chip_named
from tersor.planner.graph.costs import kept_bytes, local_bytes, owners_of
from tersor.planner.graph.ir import Graph
from tersor.planner.graph.liveness import lives
from tersor.planner.graph.moves import Mesh
from tersor.planner.graph.plan import USABLE, ModulePlan, plan_graph
from tersor.planner.graph.priced import Priced
from tersor.planner.graph.trace import trace
from tersor.planner.graph.training import ADAM, Optimiser, training
from tersor.planner.search.unfit import shown
from tersor.planner.stage_graph import Part, stage_graph
from tersor.planner.stages import Group, split
from tersor.screen import print_table

SEARCHED = 10.0
"""Seconds after which no more is looked for than stages in order."""


@dataclass(frozen=True, eq=False)
class StagePlan:
    """One stage.

    Attributes:
        plan: of its part of the graph, for one micro-batch; inputs of the graph are those of the module that it reads,
            then what earlier stages hand to it.
        sends: values that it makes, each with the later stages that read it.
        seconds: of a micro-batch, with what it is handed.
        held: bytes of a rank, with what micro-batches in flight keep.
    """

    plan: ModulePlan
    sends: Mapping[str, tuple[int, ...]]
    seconds: float
    held: float


@dataclass(frozen=True, eq=False)
class StagedPlan:
    """A pipeline of a module.

    Attributes:
        graph: the forward pass of the whole module, for one micro-batch.
        stages: in order.
        parts: micro-batches of a step.
        contiguous: whether stages are spans of the order of operators.
    """

    graph: Graph
    stages: tuple[StagePlan, ...]
    parts: int
    contiguous: bool

    @property
    def seconds(self) -> float:
        """What a step takes: all stages once, and the slowest one for each further micro-batch."""
        each = [stage.seconds for stage in self.stages]
        return sum(each) + (self.parts - 1) * max(each)

    def maker(self, name: str) -> int | None:
        """Return the stage that makes a value for others, or none: it is the module's input."""
        return next((place for place, stage in enumerate(self.stages) if name in stage.sends), None)

    def show(self) -> None:
        """Print the pipeline: a row a stage."""
        idle = 1 - sum(stage.seconds for stage in self.stages) * self.parts / (self.seconds * len(self.stages))
        took = f"{self.seconds * 1e3:.3f} ms a step, stages are idle for {idle:.0%} of it"
        print(f"{len(self.stages)} stages, {self.parts} micro-batches: {took}")
        rows = []
        for number, stage in enumerate(self.stages):
            graph = stage.plan.space.graph
            forward = [one.name for one in graph.operators if one.kind not in ("gradient", "update")]
            sent = sum(graph.values[name].bytes * len(to) for name, to in stage.sends.items())
            rows.append(
                (
                    str(number),
                    f"{forward[0]} to {forward[-1]}",
                    str(len(graph.parameters)),
                    f"{stage.seconds * 1e3:.3f}",
                    shown(stage.held),
                    shown(sent),
                    f"{100 * stage.plan.found.gap:.2f} %",
                )
            )
        columns = ("stage", "operators", "parameters", "ms", "held", "hands on", "gap")
        print_table(columns, rows, title="Stages", words=True)


def plan_stages(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    stages: int,
    mesh: Mapping[str, int] | Mesh,
    parts: int = 1,
    chip: str = "h200",
    train: bool = False,
    optimiser: Optimiser = ADAM,
    memory: float | None = None,
    search: str = "fast",
) -> StagedPlan:
    """Plan a module in pipeline stages, each on a mesh of its own.

    Args:
        module, args, kwargs: as `plan_module` takes them; the inputs are one micro-batch.
        stages: how many.
        mesh: of one stage.
        parts: micro-batches of a step.
        chip, train, optimiser, memory, search: as `plan_module` takes them.

    Raises:
        InputError: as of `plan_module`; there are fewer blocks than stages; micro-batches in flight do not fit.
    """
    graph = trace(module, args, kwargs)

    room = chip_named(chip).memory_bytes * USABLE if memory is None else memory

    def planned(of: Graph, handed: Sequence[str] = ()) -> ModulePlan:
        part = training(of, through=handed) if train else of
        axes = whole.space.mesh
        return plan_graph(part, axes, chip=chip, optimiser=optimiser, memory=room, search=search, subgroups=False)

    if stages < 1 or parts < 1:
        raise InputError(f"{stages} stages and {parts} micro-batches: there is at least one of each")
    costed = training(graph) if train else graph
    whole = plan_graph(costed, mesh, chip=chip, optimiser=optimiser, memory=math.inf, search=search)
    first = _cut_in_order(whole, stages, parts, room)
    others = [found for found in _cut_as_graph(whole, stages, room) if found != first]
    made = [_staged(graph, found, stages, parts, planned) for found in (first, *others)]
    return min(made, key=lambda plan: plan.seconds)


def _blocks(plan: ModulePlan) -> tuple[list[Part], list[list[str]]]:
    """Return the blocks of a plan as parts of `stage_graph`, in order, and the operators of each."""
    space, choice = plan.space, plan.choice
    graph, chosen = space.graph, space.chosen(plan.choice)
    groups = [group for group in space.groups if group.operators]
    seconds = {block.name: float(block.seconds[choice[block.name]]) for block in space.problem.blocks}
    for edge in space.problem.edges:
        seconds[edge.target] += float(edge.seconds[choice[edge.source], choice[edge.target]])
    home = {name: group.name for group in groups for name in group.operators}
    reads: dict[str, set[str]] = {group.name: set() for group in groups}
    handed = dict.fromkeys(reads, 0.0)
    for value in graph.values.values():
        maker = graph.makers.get(value.name)
        if maker is None or maker.name not in home:
            continue
        readers = {home[user.name] for user in graph.users[value.name] if user.name in home} - {home[maker.name]}
        for reader in readers:
            reads[reader].add(home[maker.name])
        handed[home[maker.name]] += value.bytes if readers else 0.0
    made = []
    for group in groups:
        held = kept_bytes(graph, chosen[group.name], space.mesh, space.optimiser)
        made.append(Part(group.name, seconds[group.name], held, handed[group.name], tuple(sorted(reads[group.name]))))
    return made, [[*group.operators, *group.feeders] for group in groups]


def _cut_in_order(plan: ModulePlan, stages: int, parts: int, room: float) -> dict[str, int]:
    """Return the stage of each operator, of stages that are spans of the order of blocks."""
    blocks, operators = _blocks(plan)
    if len(blocks) < stages:
        raise InputError(f"{len(blocks)} blocks of operators cannot be cut into {stages} stages")
    place = {block.name: number for number, block in enumerate(blocks)}
    last = dict.fromkeys(place, 0)
    for block in blocks:
        for source in block.reads:
            last[source] = max(last[source], place[block.name])
    handed = np.zeros((1, 1, len(blocks)))
    for number in range(len(blocks)):
        size = sum(block.handed for block in blocks[: number + 1] if last[block.name] > number)
        handed[0, 0, number] = _send(plan.space.mesh, size, plan.space.optimiser is not None)
    seconds, kept = (np.array([getattr(block, name) for block in blocks]) for name in ("seconds", "bytes"))
    if stages * room < kept.sum():  # weights that do not fit as the fastest plan has them are cut further by each stage
        room = math.inf
    found = split([Group("a stage", (1,), seconds, kept, room)], (stages,), handed, requests=parts, idle=False)
    return {
        name: number
        for number, stage in enumerate(found.stages)
        for names in operators[stage.first : stage.end]
        for name in names
    }


def _cut_as_graph(plan: ModulePlan, stages: int, room: float) -> list[dict[str, int]]:
    """Return the stage of each operator, of stages that send least; nothing where no such stages are found.

    That needs scipy, and is given up after some seconds: stages in order are there in any case.
    """
    blocks, operators = _blocks(plan)
    if stages == 1:
        return []
    try:
        staged = stage_graph(blocks, stages, unbalance=None, room=room, seconds=SEARCHED)
    except (InputError, UnsupportedError):
        return []
    named = zip(blocks, operators, strict=True)
    found = {name: staged.stage[block.name] for block, names in named for name in names}
    return [found] if set(found.values()) == set(range(stages)) else []


def _send(mesh: Mesh, size: float, back: bool) -> float:
    """Return the seconds to hand bytes to the next stage, in training their gradients back, too."""
    links = mesh[0].links
    if not size:
        return 0.0
    far = replace(links, stride=links.stride * mesh[0].ranks) if isinstance(links, Priced) else None
    once = far.send(size) if far is not None else links.all_gather(2 * size, 2)
    return once * (2 if back else 1)


def _staged(graph: Graph, stage_of: Mapping[str, int], stages: int, parts: int, planned: Any) -> StagedPlan:
    """Return the plan of all stages."""
    readers: dict[str, set[int]] = {}
    for operator in graph.operators:
        for name in operator.inputs if operator.name in stage_of else ():
            readers.setdefault(name, set()).add(stage_of[operator.name])
    for name in graph.outputs:
        readers.setdefault(name, set()).add(stages - 1)
    found = []
    for number in range(stages):
        sends: dict[str, tuple[int, ...]] = {}
        for operator in graph.operators:
            if stage_of.get(operator.name) == number:
                for name in operator.outputs:
                    later = tuple(sorted(readers.get(name, set()) - {number}))
                    sends |= {name: later} if later else {}
        part = part_of(graph, stage_of, number, tuple(sends), last=number == stages - 1)
        handed = [name for name in part.inputs if name not in graph.inputs]
        plan = planned(part, handed)
        trained = plan.space.optimiser is not None
        size = sum(graph.values[name].bytes for name in handed)
        flying = min(stages - number, parts) if trained else 1
        held = plan.held[0] + (flying - 1) * _saved(plan)
        if held > plan.room:
            raise InputError(
                f"stage {number} of {stages} needs {shown(held)} of {shown(plan.room)} with {flying} micro-batches in "
                f"flight: {shown(held - plan.room)} are missing"
            )
        found.append(StagePlan(plan, sends, plan.seconds + _send(plan.space.mesh, size, trained), held))
    order = [stage_of[operator.name] for operator in graph.operators if operator.name in stage_of]
    return StagedPlan(graph, tuple(found), parts, order == sorted(order))


def _saved(plan: ModulePlan) -> float:
    """Return the bytes of a rank that the backward pass of a micro-batch reads of its forward pass."""
    space, graph = plan.space, plan.space.graph
    owners, chosen = owners_of(graph, space.groups), space.chosen(plan.choice)
    forward = sum(operator.kind not in ("gradient", "update") for operator in graph.operators)
    kept = (name for name, (first, last) in lives(graph).items() if first < forward <= last)
    kept = (name for name in kept if name in owners and graph.values[name].role != "gradient")
    return sum(local_bytes(graph, name, owners, chosen, space.mesh) for name in kept)


def part_of(graph: Graph, stage_of: Mapping[str, int], number: int, made: tuple[str, ...], *, last: bool) -> Graph:
    """Return one stage's part of a graph: what is aside of every rank (positions, masks) each stage computes itself."""
    outputs = graph.outputs if last else made
    own = {operator.name for operator in graph.operators if stage_of.get(operator.name) == number}
    needed = {name for operator in graph.operators if operator.name in own for name in operator.inputs} | set(outputs)
    for operator in reversed(graph.operators):
        if operator.name not in stage_of and needed.intersection(operator.outputs):
            own.add(operator.name)
            needed.update(operator.inputs)
    operators = tuple(operator for operator in graph.operators if operator.name in own)
    there = {name for operator in operators for name in operator.outputs}
    values, handed = {}, []
    for name, value in graph.values.items():
        if name in needed or name in there:
            handed += [name] if name in graph.makers and name not in there else []
            values[name] = replace(value, role="input") if name in handed else value
    inputs = tuple(name for name in graph.inputs if name in needed)
    constants = {name: tensor for name, tensor in graph.constants.items() if name in needed}
    return Graph(operators, values, (*inputs, *handed), outputs, constants)
