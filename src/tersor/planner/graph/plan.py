"""From a module to a plan in one call: trace, find the fastest spread that fits, and say what it takes and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tersor.errors import InputError
from tersor.hardware import Chip, chip_named
from tersor.planner import links as tables
from tersor.planner.graph.ir import Graph
from tersor.planner.graph.moves import Mesh
from tersor.planner.graph.priced import mesh_of
from tersor.planner.graph.problem import Space, space
from tersor.planner.graph.roofline import Roofline
from tersor.planner.graph.subgroups import split_meshes
from tersor.planner.graph.trace import trace
from tersor.planner.graph.training import ADAM, Optimiser, training
from tersor.planner.problem import Choice
from tersor.planner.search import Found
from tersor.planner.search.unfit import shown
from tersor.planner.searches import search_named
from tersor.screen import print_table

USABLE = 0.95
"""Of a chip's memory, what a plan may hold."""
TRIES = 4
"""Searches with less room each, where copies of a choice do not fit."""
LINES = 20
"""Rows of the longest table."""


@dataclass(frozen=True, eq=False)
class ModulePlan:
    """The fastest spread of a module that was found.

    Attributes:
        space: all ways on the mesh, which `nn.spread.Spread` and `nn.staged.Staged` run.
        found: what the search says: a choice, its seconds, a bound, how it was found.
        chip: what it is planned for.
        held: bytes of a rank at its fullest moment, and the operator that runs then.
        room: bytes that a rank may hold.
        alone: seconds of a step in which every rank computes everything.
    """

    space: Space
    found: Found
    chip: Chip
    held: tuple[float, str]
    room: float
    alone: float

    @property
    def choice(self) -> Choice:
        """The option of each block."""
        return self.found.choice

    @property
    def seconds(self) -> float:
        """What a step takes."""
        return self.found.seconds

    def summary(self) -> tuple[str, ...]:
        """Return the plan in a few lines."""
        mesh = " x ".join(f"{axis.ranks} {axis.name}" for axis in self.space.mesh)
        trained = "training" if self.space.optimiser else "inference"
        found, gap = self.found, "how far from the best is not known"
        if not math.isinf(found.bound):
            gap = f"no plan takes less than {found.bound * 1e3:.3f} ms, gap at most {100 * found.gap:.2f} %"
        lines = (
            f"{trained} on {mesh} of {self.chip.name}: {found.seconds * 1e3:.3f} ms a step, "
            f"{self.alone / found.seconds if found.seconds else 1:.2f} times as fast as one device",
            f"{gap} ({found.method}, {found.searched:.2f} s)",
            f"{shown(self.held[0])} of {shown(self.room)} a rank, most while {self.held[1]} runs",
        )
        return (*lines, *(f"note: {note}" for note in self.space.graph.notes))

    def tables(self) -> tuple[tuple[str, Sequence[str], Sequence[Sequence[str]]], ...]:
        """Return title, columns and rows of each table: cuts of blocks, equal layers in one row, and exchanges."""
        cuts: dict[tuple[str, str], list[Any]] = {}
        for block in self.space.problem.blocks:
            index = self.choice[block.name]
            key = (block.tie or block.name, block.options[index])
            entry = cuts.setdefault(key, [block.name, 0, 0.0])
            entry[1] += 1
            entry[2] += float(block.seconds[index])
        rows = [
            (name, str(count), _shortened(option), f"{took * 1e3:.3f}")
            for (_, option), (name, count, took) in cuts.items()
        ]
        moved: dict[tuple[str, str], list[float]] = {}
        for _, step in self.space.steps(self.choice):
            total = moved.setdefault((step.kind, self.space.mesh[step.axis].name), [0, 0.0, 0.0])
            for place, more in enumerate((1, step.bytes, step.seconds)):
                total[place] += more
        steps = [
            (kind.replace("_", "-"), axis, f"{count:.0f}", shown(size), f"{took * 1e3:.3f}")
            for (kind, axis), (count, size, took) in moved.items()
        ]
        left = f"; {len(rows) - LINES} more take no longer" if len(rows) > LINES else ""
        longest = sorted(rows, key=lambda row: -float(row[3]))[:LINES]
        return (
            (f"Blocks, the longest first{left}", ("block", "layers", "cut", "ms"), longest),
            ("Exchanges", ("collective", "axis", "calls", "bytes", "ms"), steps),
        )

    def show(self) -> None:
        """Print the plan."""
        for line in self.summary():
            print(line)
        for title, columns, rows in self.tables():
            print_table(columns, rows, title=title, words=True)


def plan_module(
    module: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mesh: Mapping[str, int] | Mesh,
    chip: str = "h200",
    train: bool = False,
    optimiser: Optimiser = ADAM,
    memory: float | None = None,
    search: str = "fast",
) -> ModulePlan:
    """Plan how a module is spread over devices: the fastest way that fits.

    Args:
        module: any; its parameters may be on the meta device.
        args: example inputs, of the sizes that it is planned for.
        kwargs: likewise.
        mesh: names of axes and their ranks, such as {"data": 2, "tensor": 4}, the last one of neighbours, whose links
            are the chip's; or axes with links of their own.
        chip: the devices.
        train: whether a step is forward, backward and an update, not forward alone.
        optimiser: what training keeps for each parameter.
        memory: bytes that a rank may hold; default: 95 % of the chip's.
        search: "fast", "full" (scipy, the extra `plan`), "dqn" or "random".

    Raises:
        InputError: the module cannot be traced or trained, nothing fits, or a name is unknown.
        UnsupportedError: the search needs what is not installed.
    """
    graph = trace(module, args, kwargs)
    return plan_graph(
        training(graph) if train else graph,
        mesh,
        chip=chip,
        optimiser=optimiser,
        memory=memory,
        search=search,
    )


def plan_graph(
    graph: Graph,
    mesh: Mapping[str, int] | Mesh,
    *,
    chip: str = "h200",
    optimiser: Optimiser = ADAM,
    memory: float | None = None,
    search: str = "fast",
    subgroups: bool = True,
) -> ModulePlan:
    """Return the plan of a graph.

    Args:
        graph: of inference, or of `training`.
        mesh, chip, optimiser, memory, search: as `plan_module` takes them.
        subgroups: whether an axis with more ranks than heads of keys may become two.
    """
    target = chip_named(chip)
    room = target.memory_bytes * USABLE if memory is None else memory
    axes = mesh_of(mesh, tables.of_chip(target)) if isinstance(mesh, Mapping) else mesh
    plans, lacking = [], None
    for each in split_meshes(graph, axes) if subgroups else (axes,):
        try:
            plans.append(_plan(graph, each, target, optimiser, room, search))
        except InputError as error:
            lacking = lacking or error
    if not plans:
        assert lacking is not None
        raise lacking
    return min(plans, key=lambda plan: plan.seconds)


def _plan(graph: Graph, mesh: Mesh, chip: Chip, optimiser: Optimiser, room: float, search: str) -> ModulePlan:
    """Return the plan on one mesh.

    Memory is looked at where the fastest spread of all does not fit; where copies of a choice do not fit beside it,
    less room is searched.
    """
    solve, least = search_named(search), math.inf
    left: float | None = None
    for _ in range(TRIES):
        ways = space(graph, mesh, Roofline(chip), memory=left, optimiser=optimiser)
        try:
            found = solve(ways.problem)
        except InputError:
            if math.isinf(least):
                raise
            break
        held = ways.held(found.choice)
        if held[0] <= room:
            first = Choice({block.name: 0 for block in ways.problem.blocks})
            return ModulePlan(ways, found, chip, held, room, ways.problem.seconds(first))
        if left is not None:
            least = min(least, held[0])
        left = room if left is None else left - (held[0] - room)
        if left <= 0:
            break
    raise InputError(
        f"plans that fit but for copies and buffers of moves need {shown(least)} with them, of {shown(room)}: "
        f"{shown(least - room)} are missing"
    )


def _shortened(option: str) -> str:
    """Return the name of an option, where all operators of a block have one way, with that way once."""
    words = []
    for word in option.split():
        axis, _, names = word.rpartition(":")
        ways = names.split(">")
        words.append(f"{axis}:{ways[0]}" if len(set(ways)) == 1 else word)
    return " ".join(words)
