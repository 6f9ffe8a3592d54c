"""Which values are there when an operator runs? From the one that makes a value to the last that reads it or a view."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from tersor.planner.graph.ir import Graph


@dataclass(frozen=True, slots=True)
class Moment:
    """An operator and what is held while it runs.

    Attributes:
        operator: its name.
        values: names of activations and gradients of activations, without views of others; parameters are held always.
        bytes: of the whole values.
    """

    operator: str
    values: frozenset[str]
    bytes: int


def lives(graph: Graph) -> dict[str, tuple[int, int]]:
    """Return for each value that takes memory in a step the operators, by index, that make it and that read it last.

    An output of the graph is there until the end, which is the number of operators.
    """
    base = _bases(graph)
    found: dict[str, tuple[int, int]] = {}
    for place, operator in enumerate(graph.operators):
        for name in operator.operands:
            root = base.get(name)
            if root is not None:
                begin = place if name in operator.outputs else 0
                found[root] = (found.get(root, (begin, 0))[0], place)
    for name in graph.outputs:
        root = base.get(name)
        if root in found:
            found[root] = (found[root][0], len(graph.operators))
    return found


def totals(graph: Graph, sizes: Mapping[str, float]) -> list[float]:
    """Return for each operator the bytes that are held while it runs, of values that take so many bytes each."""
    changes = [0.0] * (len(graph.operators) + 2)
    for name, (begin, last) in lives(graph).items():
        changes[begin] += sizes.get(name, 0.0)
        changes[last + 1] -= sizes.get(name, 0.0)
    return list(itertools.accumulate(changes[: len(graph.operators)]))


def moments(graph: Graph, most: int) -> tuple[Moment, ...]:
    """Return the moments at which the whole graph holds most, of those at which more is held than at the next."""
    alive = lives(graph)
    held = totals(graph, {name: float(graph.values[name].bytes) for name in alive})
    ends = {last for _, last in alive.values()}
    peaks = sorted((place for place in ends if place < len(held)), key=lambda place: (-held[place], place))[:most]
    return tuple(
        Moment(
            graph.operators[place].name,
            frozenset(name for name, (begin, last) in alive.items() if begin <= place <= last),
            int(held[place]),
        )
        for place in peaks
    )


def _bases(graph: Graph) -> dict[str, str]:
    """Return for each value that takes memory in a step whose memory it is: its own, or that of its base."""
    base: dict[str, str] = {}
    held = {"activation", "gradient", "input"}
    parameters = {parameter.name for parameter in graph.parameters}
    for value in graph.values.values():
        if value.role in held and value.name not in graph.aside and not _of_parameter(value.name, parameters):
            base[value.name] = value.name
    for operator in graph.operators:
        if operator.kind == "view" and operator.inputs:
            for name in operator.outputs:
                if name in base:
                    if operator.inputs[0] in base:
                        base[name] = base[operator.inputs[0]]
                    else:
                        del base[name]
    return base


def _of_parameter(name: str, parameters: set[str]) -> bool:
    """Whether a value is a gradient of a parameter, which is held until the update."""
    return name.startswith("gradient of ") and name.removeprefix("gradient of ").rsplit(" by ", 1)[0] in parameters
