"""Which blocks are the same but for the names of their operators? What one costs, the others cost: layers repeat."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from tersor.planner.graph.flows import Flow
from tersor.planner.graph.groups import Group
from tersor.planner.graph.ir import Graph, Operator
from tersor.planner.graph.options import Option
from tersor.planner.graph.training import GRADIENT


def members_of(group: Group) -> tuple[str, ...]:
    """Return the names of a group's operators and parameters, in an order that groups of one form share."""
    return (*group.operators, *group.feeders, *group.parameters)


def form_of(graph: Graph, group: Group) -> Hashable:
    """Return what two groups have in common if and only if their options and costs are the same but for names."""
    operators = [graph.by_name[name] for name in (*group.operators, *group.feeders)]
    numbers: dict[str, object] = {}
    for place, operator in enumerate(operators):
        numbers.update({name: (place, index) for index, name in enumerate(operator.outputs)})
    numbers.update({name: ("parameter", place) for place, name in enumerate(group.parameters)})
    parameters = tuple(
        (_value(graph, name), f"update of {name}" in graph.by_name, len(_gradients(graph, name)))
        for name in group.parameters
    )
    return tuple(_operator(graph, operator, numbers) for operator in operators), parameters


def _gradients(graph: Graph, parameter: str) -> tuple[str, ...]:
    update = graph.by_name.get(f"update of {parameter}")
    return update.inputs[1:] if update is not None else ()


def _value(graph: Graph, name: str) -> Hashable:
    value = graph.values[name]
    return value.shape, value.dtype, value.role, value.parts


def _operator(graph: Graph, operator: Operator, numbers: Mapping[str, object]) -> Hashable:
    gradient = graph.by_name.get(GRADIENT + operator.name)
    back = (gradient.of, gradient.flops) if gradient is not None else None
    rule = (operator.kind, operator.dims, tuple(operator.sizes.items()), operator.cuts, operator.sums, operator.addends)
    operands = tuple((_value(graph, name), numbers.get(name), name in graph.aside) for name in operator.operands)
    given = tuple(name in graph.outputs for name in operator.outputs)
    return rule, operator.linear, operator.saves, operator.flops, operands, given, back


def renamed(options: tuple[Option, ...], source: Group, target: Group) -> tuple[Option, ...]:
    """Return the options of a group of the same form, under the names of another."""
    names = dict(zip(members_of(source), members_of(target), strict=True))
    return tuple(
        Option(
            option.name,
            {names[name]: ways for name, ways in option.ways.items()},
            {names[name]: places for name, places in option.stored.items()},
            {names[name]: places for name, places in option.updated.items()},
        )
        for option in options
    )


def flow_form(graph: Graph, flows: tuple[Flow, ...], source: Group, target: Group) -> Hashable:
    """Return what two bundles of flows have in common if they cost the same between groups of the same forms."""
    from_ = {name: place for place, name in enumerate(members_of(source))}
    to = {name: place for place, name in enumerate(members_of(target))}
    keys: dict[str, int] = {}
    return tuple(
        (
            _place(graph, flow.source or flow.value, from_),
            flow.made,
            _place(graph, flow.target, to),
            flow.read,
            keys.setdefault(flow.key, len(keys)),
            flow.again,
            graph.values[flow.value].bytes,
        )
        for flow in flows
    )


def _place(graph: Graph, name: str, places: Mapping[str, int]) -> Hashable:
    """Return which operator or parameter of a group a name is, or belongs to."""
    operator = graph.by_name.get(name)
    if name in places or operator is None:
        return places.get(name)
    return (operator.kind, places.get(operator.forward or operator.inputs[0]))
