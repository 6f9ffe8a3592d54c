"""Which values are there when an operator runs? From the one that makes a value to the last that reads it or a view."""

from __future__ import annotations

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


def moments(graph: Graph) -> tuple[Moment, ...]:
    """Return the moments of a graph at which more is held than at the next, in order of operators."""
    base = _bases(graph)
    last: dict[str, int] = {}
    first: dict[str, int] = {}
    for place, operator in enumerate(graph.operators):
        for name in operator.operands:
            root = base.get(name)
            if root is not None:
                first.setdefault(root, place if name in operator.outputs else 0)
                last[root] = place
    for name in graph.outputs:
        if base.get(name) is not None:
            last[base[name]] = len(graph.operators)
    begins: dict[int, list[str]] = {}
    ends: dict[int, list[str]] = {}
    for name, place in first.items():
        begins.setdefault(place, []).append(name)
        ends.setdefault(last[name], []).append(name)
    found: list[Moment] = []
    alive: dict[str, None] = {}
    size = 0
    for place, operator in enumerate(graph.operators):
        for name in begins.get(place, []):
            alive[name] = None
            size += graph.values[name].bytes
        if place in ends:
            found.append(Moment(operator.name, frozenset(alive), size))
        for name in ends.get(place, []):
            del alive[name]
            size -= graph.values[name].bytes
    return tuple(found)


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
