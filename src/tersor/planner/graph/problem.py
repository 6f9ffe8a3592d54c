"""A graph on a mesh becomes the planner's problem: blocks of operators, edges of redistribution, limits of memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tersor.errors import InputError
from tersor.planner.graph.groups import Group, groups
from tersor.planner.graph.ir import SUM, WHOLE, Graph, Operator
from tersor.planner.graph.liveness import Moment, moments
from tersor.planner.graph.moves import Mesh, Moves, Places, Step, held
from tersor.planner.graph.options import Option, options
from tersor.planner.graph.roofline import Roofline
from tersor.planner.graph.training import ADAM, GRADIENT, Optimiser
from tersor.planner.problem import Block, Choice, Edge, Floats, Problem

MOMENTS = 8
"""Limits of memory that a problem has at most: moments at which the whole graph holds most."""


@dataclass(frozen=True, slots=True)
class Flow:
    """A value that an operator reads where another made it.

    Attributes:
        value: its name.
        key: what it is one copy of: several reads at one placement are moved once.
        again: whether the backward pass reads it: parts are gathered for it a second time, sums are kept.
        source: operator that made it, "" for a parameter that is stored.
        made: which of that operator's operands it is.
        target: operator that reads it.
        read: which of its operands it is there.
    """

    value: str
    key: str
    again: bool
    source: str
    made: int
    target: str
    read: int


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
            for flow, size, from_, to in _distinct(self.graph, flows, chosen[source], chosen[target])
            for step in moves.between(size, from_, to)
        ]

    def held(self, choice: Choice) -> tuple[float, str]:
        """Return the most bytes that a rank holds at any moment, and the operator that runs then."""
        chosen = self.chosen(choice)
        kept = sum(_kept(self.graph, option, self.mesh, self.optimiser) for option in chosen.values())
        owners = _owners(self.graph, self.groups)
        local = {name: _local(self.graph, name, owners, chosen, self.mesh) for name in owners}
        most = [(sum(local.get(name, 0.0) for name in moment.values), moment.operator) for moment in moments(self.graph)]
        size, operator = max(most, default=(0.0, ""))
        return kept + size, operator


def space(
    graph: Graph,
    mesh: Mesh,
    roofline: Roofline,
    *,
    memory: float | None = None,
    optimiser: Optimiser | None = None,
    fold: bool = True,
) -> Space:
    """Return the ways to spread a graph over a mesh, at the least time within `memory` bytes a rank.

    Args:
        graph: of inference, or of `training`.
        mesh: axes of devices.
        roofline: what operators take.
        memory: bytes of a rank; `None` leaves memory out.
        optimiser: what training keeps; Adam where the graph has updates and nothing is said.
        fold: whether operators that follow from one decision are one block.

    Raises:
        InputError: the mesh has no axes, or an axis has no ranks.
    """
    if not mesh or any(axis.ranks < 1 for axis in mesh):
        raise InputError("a mesh needs at least one axis, and every axis at least one rank")
    trained = any(operator.kind == "update" for operator in graph.operators)
    optimiser = (optimiser or ADAM) if trained else None
    members = groups(graph, fold=fold)
    choices = {group.name: options(graph, group, mesh, trained=trained) for group in members}
    flows = _flows(graph, members)
    moves = Moves(mesh)
    peaks = sorted(moments(graph), key=lambda moment: -moment.bytes)[:MOMENTS] if memory is not None else []
    owners = _owners(graph, members)
    outside = _outside(flows, members)
    costs: dict[str, tuple[Floats, Floats]] = {}
    for group in members:
        own, known = choices[group.name], dict[tuple[str, object], float]()
        seconds = np.array([_seconds(graph, option, group, mesh, roofline, moves, known) for option in own])
        inside = flows.get((group.name, group.name), ())
        seconds += np.array([_moved(graph, inside, option, option, moves) for option in own])
        sizes = _bytes(graph, group, own, mesh, peaks, owners, optimiser)
        kept = _undominated(own, seconds, sizes, [_seen(graph, outside[group.name], option) for option in own])
        choices[group.name] = tuple(own[index] for index in kept)
        costs[group.name] = (seconds[kept], sizes[kept])
    ties = _ties(graph, members, choices)
    blocks = [
        Block(group.name, tuple(option.name for option in choices[group.name]), *costs[group.name], ties[group.name])
        for group in members
    ]
    places = {group.name: place for place, group in enumerate(members)}
    between: dict[tuple[str, str], Floats] = {}
    for (source, target), found in flows.items():
        if source == target:
            continue
        matrix = _matrix(graph, found, choices[source], choices[target], moves)
        if places[source] > places[target]:
            source, target, matrix = target, source, matrix.T
        between[source, target] = between.get((source, target), np.zeros(matrix.shape)) + matrix
    edges = tuple(Edge(*pair, matrix) for pair, matrix in between.items() if matrix.any())
    limits = tuple((f"held at {moment.operator}", float(memory or 0.0)) for moment in peaks)
    return Space(graph, mesh, members, choices, Problem(tuple(blocks), edges, limits), flows, optimiser)


def _outside(
    flows: Mapping[tuple[str, str], tuple[Flow, ...]], members: tuple[Group, ...]
) -> dict[str, list[tuple[Flow, bool]]]:
    """Return for each block the flows from (true) and to (false) other blocks."""
    found: dict[str, list[tuple[Flow, bool]]] = {group.name: [] for group in members}
    for (source, target), between in flows.items():
        if source != target:
            found[source] += [(flow, True) for flow in between]
            found[target] += [(flow, False) for flow in between]
    return found


def _seen(graph: Graph, outside: list[tuple[Flow, bool]], option: Option) -> object:
    """Return where an option has what its block hands to others or is handed, and its parameters."""
    ends = tuple(_ends_at(graph, flow, option, source) for flow, source in outside)
    return ends, tuple(option.stored.values()), tuple(option.updated.values())


def _undominated(own: tuple[Option, ...], seconds: Floats, sizes: Floats, seen: list[object]) -> list[int]:
    """Return options that no other, which looks the same from outside, beats or equals in time and memory."""
    alike: dict[object, list[int]] = {}
    for index in np.argsort(seconds, kind="stable"):
        others = alike.setdefault(seen[index], [])
        if not any((sizes[other] <= sizes[index]).all() for other in others):
            others.append(int(index))
    return sorted(index for kept in alike.values() for index in kept)


def _home(members: tuple[Group, ...]) -> dict[str, str]:
    """Return which block an operator or a parameter belongs to."""
    return {
        name: group.name for group in members for name in (*group.operators, *group.feeders, *group.parameters)
    }


def _flows(graph: Graph, members: tuple[Group, ...]) -> dict[tuple[str, str], tuple[Flow, ...]]:
    """Return the flows between blocks."""
    home, found = _home(members), dict[tuple[str, str], list[Flow]]()
    for operator in graph.operators:
        of = operator.forward or (operator.inputs[0] if operator.kind == "update" else operator.name)
        if of not in home:
            continue
        for read, name in enumerate(operator.inputs):
            maker = graph.makers.get(name)
            if operator.kind == "update" and read == 0:
                continue
            if graph.values[name].role == "parameter" and name in home:
                source, made, block = "", 0, home[name]
            elif maker is not None and (maker.forward or maker.name) in home:
                source = maker.name
                made, block = len(maker.inputs) + maker.outputs.index(name), home[maker.forward or maker.name]
            else:
                continue
            again = operator.kind == "gradient"
            key = name.rsplit(" by ", 1)[0] if name.startswith(GRADIENT) else name
            found.setdefault((block, home[of]), []).append(Flow(name, key, again, source, made, operator.name, read))
    for parameter in home:
        if f"update of {parameter}" in graph.by_name:
            found.setdefault((home[parameter],) * 2, []).append(Flow(parameter, f"new {parameter}", False, "", 0, "", 0))
    return {pair: tuple(flows) for pair, flows in found.items()}


def _ends(graph: Graph, flow: Flow, source: Option, target: Option) -> tuple[Places, Places]:
    """Return where a flow comes from, and where it goes."""
    if not flow.target:
        return source.updated[flow.value], source.stored[flow.value]
    from_ = source.places(graph, graph.by_name[flow.source], flow.made) if flow.source else source.stored[flow.value]
    return from_, target.places(graph, graph.by_name[flow.target], flow.read)


def _distinct(
    graph: Graph, flows: tuple[Flow, ...], source: Option, target: Option
) -> list[tuple[Flow, int, Places, Places]]:
    """Return flows with bytes and placements, each copy once: results that are read twice, gradients that are added."""
    found: dict[object, tuple[Flow, int, Places, Places]] = {}
    for flow in flows:
        from_, to = _ends(graph, flow, source, target)
        found.setdefault(_copy(flow, from_, to), (flow, graph.values[flow.value].bytes, from_, to))
    return list(found.values())


def _copy(flow: Flow, source: Places, target: Places) -> tuple[object, Places, Places]:
    """Return what tells copies of a value apart."""
    return (flow.key, flow.again and SUM not in source), source, target


def _moved(graph: Graph, flows: tuple[Flow, ...], source: Option, target: Option, moves: Moves) -> float:
    return sum(moves.seconds(size, from_, to) for _, size, from_, to in _distinct(graph, flows, source, target))


def _matrix(
    graph: Graph, flows: tuple[Flow, ...], sources: tuple[Option, ...], targets: tuple[Option, ...], moves: Moves
) -> Floats:
    """Return [sources, targets], seconds; options that place what flows alike are counted once."""
    rows, row_of = _kinds(sources, lambda option: tuple(_ends_at(graph, flow, option, True) for flow in flows))
    columns, column_of = _kinds(targets, lambda option: tuple(_ends_at(graph, flow, option, False) for flow in flows))
    small = np.zeros((len(rows), len(columns)))
    for row, from_ in enumerate(rows):
        for column, to in enumerate(columns):
            keys = {
                _copy(flow, a, b): graph.values[flow.value].bytes for flow, a, b in zip(flows, from_, to, strict=True)
            }
            small[row, column] = sum(moves.seconds(size, a, b) for (_, a, b), size in keys.items())
    return small[np.ix_(row_of, column_of)]


def _ends_at(graph: Graph, flow: Flow, option: Option, source: bool) -> Places:
    if source:
        return option.places(graph, graph.by_name[flow.source], flow.made) if flow.source else option.stored[flow.value]
    return option.places(graph, graph.by_name[flow.target], flow.read)


def _kinds(
    own: tuple[Option, ...], key: Callable[[Option], tuple[Places, ...]]
) -> tuple[list[tuple[Places, ...]], list[int]]:
    kinds: dict[tuple[Places, ...], int] = {}
    of = [kinds.setdefault(key(option), len(kinds)) for option in own]
    return list(kinds), of


def _seconds(
    graph: Graph,
    option: Option,
    group: Group,
    mesh: Mesh,
    roofline: Roofline,
    moves: Moves,
    known: dict[tuple[str, object], float],
) -> float:
    """Return what a rank computes of a block, and the sums of the graph's outputs; `known` has single operators."""
    total = 0.0
    names = {*group.operators, *group.feeders}
    for name in (*group.operators, *group.feeders, *(f"{GRADIENT}{name}" for name in names)):
        if name in graph.by_name:
            operator = graph.by_name[name]
            key = (name, tuple(way.name for way in option.ways[operator.forward or name]))
            if key not in known:
                known[key] = _operator_seconds(graph, operator, option, mesh, roofline)
            total += known[key]
    for parameter in group.parameters:
        if f"update of {parameter}" in graph.by_name:
            total += _operator_seconds(graph, graph.by_name[f"update of {parameter}"], option, mesh, roofline)
    for name in group.operators:
        operator = graph.by_name[name]
        for place, output in enumerate(operator.outputs):
            if output in graph.outputs:
                places = option.places(graph, operator, len(operator.inputs) + place)
                target = tuple(WHOLE if place.kind == "sum" else place for place in places)
                total += moves.seconds(graph.values[output].bytes, places, target)
    return total


def _operator_seconds(graph: Graph, operator: Operator, option: Option, mesh: Mesh, roofline: Roofline) -> float:
    size = sum(
        held(graph.values[name].bytes, option.places(graph, operator, place), mesh)
        for place, name in enumerate(operator.operands)
    )
    kind = operator.kind
    if kind == "update":
        size *= 3  # the parameter and its state are read and written
    if kind == "gradient":
        kind = graph.by_name[operator.forward].kind
    dtypes = [graph.values[name].dtype for name in operator.operands if graph.values[name].dtype.is_floating_point]
    dtype = min(dtypes, key=lambda one: one.itemsize) if dtypes else graph.values[operator.operands[0]].dtype
    return roofline.seconds(kind, operator.flops / option.slices(operator, mesh), size, dtype)


def _owners(graph: Graph, members: tuple[Group, ...]) -> dict[str, tuple[str, str, int]]:
    """Return for each value of a step that takes memory: the block, operator and operand that say where it is."""
    home, found = _home(members), dict[str, tuple[str, str, int]]()
    for operator in graph.operators:
        of = operator.forward or operator.name
        if of not in home or operator.kind == "update":
            continue
        for place, name in enumerate(operator.operands):
            if place >= len(operator.inputs) or graph.values[name].role == "input":
                found.setdefault(name, (home[of], operator.name, place))
    return found


def _local(
    graph: Graph,
    name: str,
    owners: Mapping[str, tuple[str, str, int]],
    chosen: Mapping[str, Option],
    mesh: Mesh,
) -> float:
    block, operator, place = owners[name]
    return held(graph.values[name].bytes, chosen[block].places(graph, graph.by_name[operator], place), mesh)


def _kept(graph: Graph, option: Option, mesh: Mesh, optimiser: Optimiser | None) -> float:
    """Return the bytes of a block's parameters, in training with gradients and state."""
    total = 0.0
    for name, places in option.stored.items():
        total += held(graph.values[name].bytes, places, mesh)
        if optimiser is not None and f"update of {name}" in graph.by_name:
            value = graph.values[name]
            total += held(value.bytes + optimiser.state(value), option.updated[name], mesh)
    return total


def _bytes(
    graph: Graph,
    group: Group,
    own: tuple[Option, ...],
    mesh: Mesh,
    peaks: list[Moment],
    owners: Mapping[str, tuple[str, str, int]],
    optimiser: Optimiser | None,
) -> Floats:
    """Return [options, moments], what a block holds at each."""
    sizes = np.zeros((len(own), len(peaks)))
    mine = {name for name, (block, _, _) in owners.items() if block == group.name}
    for row, option in enumerate(own):
        kept = _kept(graph, option, mesh, optimiser)
        local = {name: _local(graph, name, owners, {group.name: option}, mesh) for name in mine} if peaks else {}
        for column, moment in enumerate(peaks):
            sizes[row, column] = kept + sum(local[name] for name in mine & moment.values)
    return sizes


def _ties(
    graph: Graph, members: tuple[Group, ...], choices: Mapping[str, tuple[Option, ...]]
) -> dict[str, str]:
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
