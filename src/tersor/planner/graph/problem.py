"""A graph on a mesh becomes the planner's problem: blocks of operators, edges of redistribution, limits of memory."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from tersor.errors import InputError
from tersor.planner.graph.copies import moved_bytes
from tersor.planner.graph.costs import block_bytes, block_seconds, kept_bytes, local_bytes, owners_of
from tersor.planner.graph.flows import Flow, distinct, end, flows_of, matrix_of, moved, outside
from tersor.planner.graph.forms import flow_form, form_of, renamed
from tersor.planner.graph.groups import Group, groups
from tersor.planner.graph.ir import Graph
from tersor.planner.graph.liveness import moments, totals
from tersor.planner.graph.moves import Mesh, Moves, Step
from tersor.planner.graph.options import Option, options
from tersor.planner.graph.roofline import Roofline
from tersor.planner.graph.training import ADAM, Optimiser
from tersor.planner.problem import Block, Choice, Edge, Floats, Problem

MOMENTS = 8
"""Limits of memory that a problem has at most: moments at which the whole graph holds most."""


@dataclass(frozen=True, eq=False)
class Space:
    """All ways to spread a graph over a mesh.

    Attributes:
        graph: what is spread, with its backward pass in training.
        mesh: over what.
        groups: operators of each block.
        options: of each block, by its name.
        problem: what searches solve.
        flows: what blocks hand to each other and to themselves: (source, target) -> flows.
        optimiser: what is kept for each parameter; `None` in inference.
    """

    graph: Graph
    mesh: Mesh
    groups: tuple[Group, ...]
    options: Mapping[str, tuple[Option, ...]]
    problem: Problem
    flows: Mapping[tuple[str, str], tuple[Flow, ...]]
    optimiser: Optimiser | None

    def chosen(self, choice: Choice) -> dict[str, Option]:
        """Return the option of each block."""
        return {name: self.options[name][index] for name, index in choice.items()}

    def steps(self, choice: Choice) -> list[tuple[Flow, Step]]:
        """Return every collective of a choice, with the value that it moves."""
        moves, chosen = Moves(self.mesh), self.chosen(choice)
        return [
            (flow, step)
            for (source, target), flows in self.flows.items()
            for flow, size, from_, to in distinct(self.graph, flows, chosen[source], chosen[target])
            for step in moves.between(size, from_, to, self.graph.values[flow.value].parts)
        ]

    def held(self, choice: Choice, *, moves: bool = True) -> tuple[float, str]:
        """Return the most bytes that a rank holds at any moment, and the operator that runs then.

        With `moves` false, without copies that moves make and buffers of collectives, as limits of the problem count.
        """
        chosen = self.chosen(choice)
        kept = sum(kept_bytes(self.graph, option, self.mesh, self.optimiser) for option in chosen.values())
        owners = owners_of(self.graph, self.groups)
        local = {name: local_bytes(self.graph, name, owners, chosen, self.mesh) for name in owners}
        by_operator = totals(self.graph, local)
        if moves:
            more = moved_bytes(self.graph, self.flows, chosen, Moves(self.mesh))
            by_operator = [one + other for one, other in zip(by_operator, more, strict=True)]
        place = max(range(len(by_operator)), key=by_operator.__getitem__)
        return kept + by_operator[place], self.graph.operators[place].name


def space(
    graph: Graph,
    mesh: Mesh,
    roofline: Roofline,
    *,
    memory: float | None = None,
    optimiser: Optimiser | None = None,
    fold: bool = True,
    every: bool = False,
) -> Space:
    """Return the ways to spread a graph over a mesh, at the least time within `memory` bytes a rank.

    Args:
        graph: of inference, or of `training`.
        mesh: axes of devices.
        roofline: what operators take.
        memory: bytes of a rank; `None` leaves memory out.
        optimiser: what training keeps; Adam where the graph has updates and nothing is said.
        fold: whether operators that follow from one decision are one block.
        every: whether to keep options that another one of the block beats in whatever choice.

    Raises:
        InputError: the mesh has no axes, or an axis has no ranks.
    """
    if not mesh or any(axis.ranks < 1 for axis in mesh):
        raise InputError("a mesh needs at least one axis, and every axis at least one rank")
    trained = any(operator.kind == "update" for operator in graph.operators)
    optimiser = (optimiser or ADAM) if trained else None
    members = groups(graph, fold=fold)
    forms = {group.name: form_of(graph, group) for group in members}
    first: dict[Hashable, tuple[Group, tuple[Option, ...]]] = {}
    choices: dict[str, tuple[Option, ...]] = {}
    for group in members:
        if forms[group.name] not in first:
            first[forms[group.name]] = (group, options(graph, group, mesh, trained=trained))
        model, found = first[forms[group.name]]
        choices[group.name] = found if model is group else renamed(found, model, group)
    flows = flows_of(graph, members)
    moves = Moves(mesh)
    peaks = moments(graph, MOMENTS) if memory is not None else ()
    owners = owners_of(graph, members)
    others = outside(flows, members)
    costs: dict[str, tuple[Floats, Floats]] = {}
    whole: dict[Hashable, Floats] = {}
    keeps: dict[str, tuple[int, ...]] = {}
    for group in members:
        own, known = choices[group.name], dict[tuple[str, object], float]()
        inside = flows.get((group.name, group.name), ())
        form = (forms[group.name], flow_form(graph, inside, group, group))
        if form not in whole:
            alone = [block_seconds(graph, option, group, mesh, roofline, known) for option in own]
            whole[form] = np.array(alone) + [moved(graph, inside, option, option, moves) for option in own]
        seconds = whole[form]
        sizes = block_bytes(graph, group, own, mesh, peaks, owners, optimiser)
        seen = [(index if every else _seen(graph, others[group.name], option)) for index, option in enumerate(own)]
        kept = _undominated(own, seconds, sizes, seen)
        keeps[group.name] = tuple(kept)
        choices[group.name] = tuple(own[index] for index in kept)
        costs[group.name] = (seconds[kept], sizes[kept])
    ties = _ties(graph, members, choices)
    blocks = [
        Block(group.name, tuple(option.name for option in choices[group.name]), *costs[group.name], ties[group.name])
        for group in members
    ]
    places = {group.name: place for place, group in enumerate(members)}
    group_of = {group.name: group for group in members}
    between: dict[tuple[str, str], Floats] = {}
    matrices: dict[Hashable, Floats] = {}
    for (source, target), bundle in flows.items():
        if source == target:
            continue
        ends = tuple((forms[name], keeps[name]) for name in (source, target))
        key = (ends, flow_form(graph, bundle, group_of[source], group_of[target]))
        if key not in matrices:
            matrices[key] = matrix_of(graph, bundle, choices[source], choices[target], moves)
        matrix = matrices[key]
        if places[source] > places[target]:
            source, target, matrix = target, source, matrix.T
        between[source, target] = between.get((source, target), np.zeros(matrix.shape)) + matrix
    edges = tuple(Edge(*pair, matrix) for pair, matrix in between.items() if matrix.any())
    limits = tuple((f"held at {moment.operator}", float(memory or 0.0)) for moment in peaks)
    return Space(graph, mesh, members, choices, Problem(tuple(blocks), edges, limits), flows, optimiser)


def _seen(graph: Graph, others: list[tuple[Flow, bool]], option: Option) -> object:
    """Return where an option has what its block hands to others or is handed; parameters of its own are nobody's."""
    return tuple(end(graph, flow, option, source) for flow, source in others)


def _undominated(own: tuple[Option, ...], seconds: Floats, sizes: Floats, seen: list[object]) -> list[int]:
    """Return options that no other, which looks the same from outside, beats or equals in time and memory.

    The first one, of every rank computing all, stays: it is what others are compared with.
    """
    alike: dict[object, list[int]] = {}
    for index in np.argsort(seconds, kind="stable"):
        others = alike.setdefault(seen[index], [])
        if not any((sizes[other] <= sizes[index]).all() for other in others):
            others.append(int(index))
    return sorted({0, *(index for kept in alike.values() for index in kept)})


def _ties(graph: Graph, members: tuple[Group, ...], choices: Mapping[str, tuple[Option, ...]]) -> dict[str, str]:
    """Return a tie for each block: those of layers that differ only in their number, with the same operators."""
    counts: dict[tuple[str, str], int] = {}
    kinds: dict[str, int] = {}
    ties: dict[str, str] = {}
    for group in members:
        path = graph.by_name[group.operators[0]].path if group.operators else ""
        general = re.sub(r"\b\d+\b", "*", path)
        if general == path:
            ties[group.name] = ""
            continue
        shapes = [
            (operator.kind, [graph.values[name].shape for name in operator.operands])
            for operator in (graph.by_name[name] for name in group.operators)
        ]
        kind = f"{shapes} {[option.name for option in choices[group.name]]}"
        number = counts[path, kind] = counts.get((path, kind), -1) + 1
        ties[group.name] = f"{general} {number} {kinds.setdefault(kind, len(kinds))}"
    return ties
