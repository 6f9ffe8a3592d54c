"""What operators hand to each other, and what it takes when the one has it elsewhere than the other needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tersor.planner.graph.groups import Group
from tersor.planner.graph.ir import SUM, WHOLE, Graph
from tersor.planner.graph.moves import Moves, Places
from tersor.planner.graph.options import Option
from tersor.planner.graph.training import GRADIENT
from tersor.planner.problem import Floats


@dataclass(frozen=True, slots=True)
class Flow:
    """A value that an operator reads where another made it.

    Attributes:
        value: its name.
        key: what it is one copy of: several reads at one placement are moved once.
        again: whether the backward pass reads it: parts are gathered for it a second time, sums are kept.
        source: operator that made it, "" for a parameter that is stored.
        made: which of that operator's operands it is.
        target: operator that reads it, "" for the caller, and for a parameter that is stored after its update.
        read: which of its operands it is there.
    """

    value: str
    key: str
    again: bool
    source: str
    made: int
    target: str
    read: int


def home_of(members: tuple[Group, ...]) -> dict[str, str]:
    """Return which block an operator or a parameter belongs to."""
    return {name: group.name for group in members for name in (*group.operators, *group.feeders, *group.parameters)}


def flows_of(graph: Graph, members: tuple[Group, ...]) -> dict[tuple[str, str], tuple[Flow, ...]]:
    """Return the flows between blocks."""
    home, found = home_of(members), dict[tuple[str, str], list[Flow]]()
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
    for name in graph.outputs:
        maker = graph.makers.get(name)
        if maker is not None and maker.name in home:
            made = len(maker.inputs) + maker.outputs.index(name)
            given = Flow(name, name, False, maker.name, made, "", 0)
            found.setdefault((home[maker.name],) * 2, []).append(given)
    for parameter in home:
        if f"update of {parameter}" in graph.by_name:
            found.setdefault((home[parameter],) * 2, []).append(
                Flow(parameter, f"new {parameter}", False, "", 0, "", 0)
            )
    return {pair: tuple(flows) for pair, flows in found.items()}


def outside(
    flows: Mapping[tuple[str, str], tuple[Flow, ...]], members: tuple[Group, ...]
) -> dict[str, list[tuple[Flow, bool]]]:
    """Return for each block the flows from (true) and to (false) other blocks."""
    found: dict[str, list[tuple[Flow, bool]]] = {group.name: [] for group in members}
    for (source, target), between in flows.items():
        if source != target:
            found[source] += [(flow, True) for flow in between]
            found[target] += [(flow, False) for flow in between]
    return found


def ends(graph: Graph, flow: Flow, source: Option, target: Option) -> tuple[Places, Places]:
    """Return where a flow comes from, and where it goes."""
    if not flow.target and flow.source:  # the caller gets no pending sums
        places = source.places(graph, graph.by_name[flow.source], flow.made)
        return places, tuple(WHOLE if place == SUM else place for place in places)
    if not flow.target:
        return source.updated[flow.value], source.stored[flow.value]
    from_ = source.places(graph, graph.by_name[flow.source], flow.made) if flow.source else source.stored[flow.value]
    return from_, target.places(graph, graph.by_name[flow.target], flow.read)


def distinct(
    graph: Graph, flows: tuple[Flow, ...], source: Option, target: Option
) -> list[tuple[Flow, int, Places, Places]]:
    """Return flows with bytes and placements, each copy once: results that are read twice, gradients that are added."""
    found: dict[object, tuple[Flow, int, Places, Places]] = {}
    for flow in flows:
        from_, to = ends(graph, flow, source, target)
        found.setdefault(_copy(flow, from_, to), (flow, graph.values[flow.value].bytes, from_, to))
    return list(found.values())


def _copy(flow: Flow, source: Places, target: Places) -> tuple[object, Places, Places]:
    """Return what tells copies of a value apart."""
    return (flow.key, flow.again and SUM not in source), source, target


def moved(graph: Graph, flows: tuple[Flow, ...], source: Option, target: Option, moves: Moves) -> float:
    """Return the seconds of flows inside one block, or between two."""
    return sum(
        moves.seconds(size, from_, to, graph.values[flow.value].parts)
        for flow, size, from_, to in distinct(graph, flows, source, target)
    )


def matrix_of(
    graph: Graph, flows: tuple[Flow, ...], sources: tuple[Option, ...], targets: tuple[Option, ...], moves: Moves
) -> Floats:
    """Return [sources, targets], seconds; options that place what flows alike are counted once."""
    rows, row_of = _kinds(sources, lambda option: tuple(end(graph, flow, option, True) for flow in flows))
    columns, column_of = _kinds(targets, lambda option: tuple(end(graph, flow, option, False) for flow in flows))
    small = np.zeros((len(rows), len(columns)))
    for row, from_ in enumerate(rows):
        for column, to in enumerate(columns):
            keys = {_copy(flow, a, b): graph.values[flow.value] for flow, a, b in zip(flows, from_, to, strict=True)}
            small[row, column] = sum(moves.seconds(of.bytes, a, b, of.parts) for (_, a, b), of in keys.items())
    return small[np.ix_(row_of, column_of)]


def end(graph: Graph, flow: Flow, option: Option, source: bool) -> Places:
    """Return where a flow begins in an option of the block that makes it, or ends in one of the block that reads it."""
    if source:
        return option.places(graph, graph.by_name[flow.source], flow.made) if flow.source else option.stored[flow.value]
    return option.places(graph, graph.by_name[flow.target], flow.read)


def _kinds(
    own: tuple[Option, ...], key: Callable[[Option], tuple[Places, ...]]
) -> tuple[list[tuple[Places, ...]], list[int]]:
    kinds: dict[tuple[Places, ...], int] = {}
    of = [kinds.setdefault(key(option), len(kinds)) for option in own]
    return list(kinds), of
