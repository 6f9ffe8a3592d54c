"""Which operators follow from one decision? They become one block of the planner's problem.

A product decides for itself, and so does an operator at which results of two blocks meet (a residual sum). Whatever
reads only what one block makes follows: an activation after its product, a norm after its sum, views after anything
(the cones of Rhino, arXiv 2302.08141, as its open form TePDist has them). Where a follower cannot take a result as it
is (a pending sum before an activation), each of its ways is an option of the block.
"""

from __future__ import annotations

from dataclasses import dataclass

from tersor.planner.graph.cuts import EVERYWHERE, Way, ways
from tersor.planner.graph.ir import WHOLE, Graph, Operator, Placement
from tersor.planner.graph.shares import fits

DECIDES = ("matmul", "convolution", "attention", "embedding", "select", "other")
"""Kinds of operators that are a block of their own."""


@dataclass(frozen=True, slots=True)
class Group:
    """Operators of one block.

    Attributes:
        name: unique in the graph.
        operators: those of the forward pass in order, the deciding one first; none where it is a shared parameter.
        feeders: operators that make the weights that they read, last one first.
        parameters: parameters that are stored as these operators read them, or the shared one.
    """

    name: str
    operators: tuple[str, ...]
    feeders: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


def groups(graph: Graph, *, fold: bool = True) -> tuple[Group, ...]:
    """Return the groups of the forward operators that are not aside; without `fold`, each operator is one."""
    forward = [operator for operator in graph.operators if operator.kind not in ("gradient", "update")]
    forward = [operator for operator in forward if not graph.aside.issuperset(operator.outputs)]
    feeding = _feeders(graph, forward)
    of_value: dict[str, int] = {}
    members: list[list[str]] = []
    for operator in forward:
        if operator.name in feeding:
            continue
        made = {of_value[name] for name in operator.inputs if name in of_value}
        main = [name for name in operator.inputs if _is_result(graph, name, feeding)]
        joins = fold and operator.kind not in DECIDES and len(made) == 1 and bool(main)
        place = made.pop() if joins else len(members)
        if not joins:
            members.append([])
        members[place].append(operator.name)
        of_value.update(dict.fromkeys(operator.outputs, place))
    homes = _homes(graph, members, feeding)
    return tuple(_shared(graph, homes)) + tuple(
        _group(graph, names, feeding, homes, place) for place, names in enumerate(members)
    )


def _is_result(graph: Graph, name: str, feeding: dict[str, str]) -> bool:
    """Whether a value is what operators make of inputs, rather than a weight or aside."""
    maker = graph.makers.get(name)
    return name not in graph.aside and maker is not None and maker.name not in feeding


def _readers(graph: Graph, name: str) -> list[Operator]:
    return [user for user in graph.users[name] if user.kind not in ("gradient", "update")]


def _feeders(graph: Graph, forward: list[Operator]) -> dict[str, str]:
    """Return operators that read only parameters and have one reader, which decides for them: name -> reader."""
    weights = {parameter.name for parameter in graph.parameters}
    found: dict[str, str] = {}
    for operator in forward:
        readers = [user for name in operator.outputs for user in _readers(graph, name)]
        if operator.kind in ("view", "pointwise", "cat") and weights.issuperset(operator.inputs) and len(readers) == 1:
            found[operator.name] = readers[0].name
            weights.update(operator.outputs)
    return found


def _homes(graph: Graph, members: list[list[str]], feeding: dict[str, str]) -> dict[str, int]:
    """Return for each parameter the group that alone reads it, or -1 where several operators do."""
    place_of = {name: place for place, names in enumerate(members) for name in names}
    homes: dict[str, int] = {}
    for parameter in graph.parameters:
        readers = [user.name for user in _readers(graph, parameter.name)]
        if len(readers) == 1:
            reader = readers[0]
            while reader in feeding:
                reader = feeding[reader]
            homes[parameter.name] = place_of[reader]
        elif readers:
            homes[parameter.name] = -1
    return homes


def _shared(graph: Graph, homes: dict[str, int]) -> list[Group]:
    return [Group(graph.values[name].path or name, (), (), (name,)) for name, place in homes.items() if place == -1]


def _group(graph: Graph, names: list[str], feeding: dict[str, str], homes: dict[str, int], place: int) -> Group:
    """Return the group of these operators, with what feeds them."""
    feeders: list[str] = []
    wanted = set(names)
    for operator in reversed(graph.operators):
        if feeding.get(operator.name) in wanted:
            feeders.append(operator.name)
            wanted.add(operator.name)
    root = graph.by_name[names[0]]
    name = f"{root.path}:{root.name}" if root.path else root.name
    parameters = tuple(parameter for parameter, home in homes.items() if home == place)
    return Group(name, tuple(names), tuple(feeders), parameters)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A way for each operator of a group along one axis.

    Attributes:
        name: the way of the deciding operator, and those of followers that had a choice.
        ways: by operator, feeders too.
        stored: by parameter, where it is.
    """

    name: str
    ways: dict[str, Way]
    stored: dict[str, Placement]


def assignments(graph: Graph, group: Group, ranks: int) -> tuple[Assignment, ...]:
    """Return the ways of a group along an axis of so many ranks, that of every rank computing all first."""
    if not group.operators:
        name = group.parameters[0]
        return tuple(Assignment(str(place), {}, {name: place}) for place in _stores(graph, name, ranks))
    found: list[Assignment] = []
    operators = [graph.by_name[name] for name in group.operators]
    choices = {operator.name: ways(operator, ranks, sums=False) for operator in operators}

    def extend(index: int, chosen: dict[str, Way], places: dict[str, Placement], label: tuple[str, ...]) -> None:
        if index == len(operators):
            found.append(_complete(graph, group, ">".join(label), dict(chosen), ranks))
            return
        operator = operators[index]
        inside = [(place, places[name]) for place, name in enumerate(operator.inputs) if name in places]
        usable = following(choices[operator.name], inside)
        for way in usable:
            count = len(operator.inputs)
            made = dict(zip(operator.outputs, way.places[count:], strict=True))
            more = (way.name,) if index == 0 or len(usable) > 1 else ()
            extend(index + 1, {**chosen, operator.name: way}, {**places, **made}, label + more)

    extend(0, {}, {}, ())
    return tuple(found)


def following(choices: tuple[Way, ...], inside: list[tuple[int, Placement]]) -> list[Way]:
    """Return the ways of an operator that follow when inputs are at these placements.

    Those that take all of them as they are; else those that cost nothing (a slice of what is whole, or calling it an
    addend); else those that move the fewest.
    """
    if not inside:
        return list(choices)
    exact = [way for way in choices if all(way.places[index] == place for index, place in inside)]
    if exact:
        return exact
    free = [way for way in choices if all(way.places[index] == place or place == WHOLE for index, place in inside)]
    if free:
        return free
    usable = [way for way in choices if way.cuts or way.name == EVERYWHERE]
    moved = [sum(way.places[index] != place != WHOLE for index, place in inside) for way in usable]
    return [way for way, count in zip(usable, moved, strict=True) if count == min(moved)]


def _stores(graph: Graph, name: str, ranks: int) -> list[Placement]:
    """Return where a parameter may be stored: whole, or any part cut."""
    parts = graph.values[name].parts
    cuts = [
        Placement("cut", dim, part)
        for dim, sizes in enumerate(parts)
        for part, size in enumerate(sizes)
        if fits(size, ranks)
    ]
    return [WHOLE, *cuts]


def _complete(graph: Graph, group: Group, name: str, chosen: dict[str, Way], ranks: int) -> Assignment:
    """Return the assignment with ways of feeders and places of parameters that follow from it."""
    for feeder in group.feeders:
        operator = graph.by_name[feeder]
        reader = _readers(graph, operator.outputs[0])[0]
        wanted = chosen[reader.name].places[reader.inputs.index(operator.outputs[0])]
        count = len(operator.inputs)
        options = ways(operator, ranks, sums=False)
        chosen[feeder] = next((way for way in options if way.cuts and way.places[count] == wanted), options[0])
    stored: dict[str, Placement] = {}
    for parameter in group.parameters:
        reader = _readers(graph, parameter)[0]
        place = chosen[reader.name].places[reader.inputs.index(parameter)]
        stored[parameter] = WHOLE if place.kind == "sum" else place
    return Assignment(name, chosen, stored)
