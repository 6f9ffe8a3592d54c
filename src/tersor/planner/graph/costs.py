"""What an option of a block takes on each rank: seconds of its operators, bytes of what they keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tersor.planner.graph.flows import home_of
from tersor.planner.graph.groups import Group
from tersor.planner.graph.ir import Graph, Operator
from tersor.planner.graph.liveness import Moment
from tersor.planner.graph.moves import Mesh, held
from tersor.planner.graph.options import Option
from tersor.planner.graph.roofline import Roofline
from tersor.planner.graph.training import GRADIENT, Optimiser
from tersor.planner.problem import Floats


def block_seconds(
    graph: Graph,
    option: Option,
    group: Group,
    mesh: Mesh,
    roofline: Roofline,
    known: dict[tuple[str, object], float],
) -> float:
    """Return the seconds that a rank computes of a block; `known` has those of operators in other options."""
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
    return total


def _operator_seconds(graph: Graph, operator: Operator, option: Option, mesh: Mesh, roofline: Roofline) -> float:
    size = sum(
        held(graph.values[name].bytes, option.places(graph, operator, place), mesh, graph.values[name].parts)
        for place, name in enumerate(operator.operands)
    )
    kind = operator.kind
    if kind == "update":
        size *= 3  # the parameter and its state are read and written
    if kind == "gradient":
        kind = graph.by_name[operator.forward].kind
    dtypes = [graph.values[name].dtype for name in operator.operands if graph.values[name].dtype.is_floating_point]
    dtype = min(dtypes, key=lambda one: one.itemsize) if dtypes else graph.values[operator.operands[0]].dtype
    return roofline.seconds(kind, operator.flops * option.share(operator, mesh), size, dtype)


def owners_of(graph: Graph, members: tuple[Group, ...]) -> dict[str, tuple[str, str, int]]:
    """Return for each value of a step that takes memory: the block, operator and operand that say where it is."""
    home, found = home_of(members), dict[str, tuple[str, str, int]]()
    for operator in graph.operators:
        of = operator.forward or operator.name
        if of not in home or operator.kind == "update":
            continue
        for place, name in enumerate(operator.operands):
            given = name not in graph.makers and graph.values[name].role in ("input", "gradient")
            if given or place >= len(operator.inputs):
                found.setdefault(name, (home[of], operator.name, place))
    return found


def local_bytes(
    graph: Graph,
    name: str,
    owners: Mapping[str, tuple[str, str, int]],
    chosen: Mapping[str, Option],
    mesh: Mesh,
) -> float:
    """Return the bytes that a rank has of a value, whose block is among those chosen."""
    block, operator, place = owners[name]
    places, value = chosen[block].places(graph, graph.by_name[operator], place), graph.values[name]
    return held(value.bytes, places, mesh, value.parts)


def kept_bytes(graph: Graph, option: Option, mesh: Mesh, optimiser: Optimiser | None) -> float:
    """Return the bytes of a block's parameters, in training with gradients and state."""
    total = 0.0
    for name, places in option.stored.items():
        value = graph.values[name]
        total += held(value.bytes, places, mesh, value.parts)
        if optimiser is not None and f"update of {name}" in graph.by_name:
            total += held(value.bytes + optimiser.state(value), option.updated[name], mesh, value.parts)
    return total


def block_bytes(
    graph: Graph,
    group: Group,
    own: tuple[Option, ...],
    mesh: Mesh,
    peaks: Sequence[Moment],
    owners: Mapping[str, tuple[str, str, int]],
    optimiser: Optimiser | None,
) -> Floats:
    """Return [options, moments], what a block holds at each."""
    sizes = np.zeros((len(own), len(peaks)))
    of_moments = frozenset[str]().union(*(moment.values for moment in peaks))
    mine = {name for name in of_moments if name in owners and owners[name][0] == group.name}
    for row, option in enumerate(own):
        kept = kept_bytes(graph, option, mesh, optimiser)
        local = {name: local_bytes(graph, name, owners, {group.name: option}, mesh) for name in mine}
        for column, moment in enumerate(peaks):
            sizes[row, column] = kept + sum(local[name] for name in mine & moment.values)
    return sizes
