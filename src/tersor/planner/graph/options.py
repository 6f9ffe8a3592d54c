"""The options of a group on a mesh: an assignment along each axis; in training, how parameters and state are kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tersor.planner.graph.cuts import Way, gradient_place
from tersor.planner.graph.groups import Assignment, Group, assignments
from tersor.planner.graph.ir import WHOLE, Graph, Operator, Placement, cut
from tersor.planner.graph.moves import Mesh, Places

KEEPS = ("", "state", "weights")
"""How training keeps what is whole along an axis: as it is, with gradients and state cut, with weights cut, too."""


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One option of a block: where everything of its operators is.

    Attributes:
        name: ways by axis, such as "data:row0 tensor:out", with what is kept cut.
        ways: by operator of the forward pass, a way for each axis.
        stored: by parameter that lives in the block, where its weights are.
        updated: likewise, where its gradient and state are.
    """

    name: str
    ways: Mapping[str, tuple[Way, ...]]
    stored: Mapping[str, Places]
    updated: Mapping[str, Places]
    _known: dict[tuple[str, int], Places] = field(default_factory=dict, repr=False)

    def places(self, graph: Graph, operator: Operator, operand: int) -> Places:
        """Return where an operand of an operator of the block is, gradients and updates too."""
        key = (operator.name, operand)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._places(graph, operator, operand)
        return found

    def _places(self, graph: Graph, operator: Operator, operand: int) -> Places:
        if operator.kind == "update":
            return self.updated[operator.inputs[0]]
        if operator.kind != "gradient":
            return tuple(way.places[operand] for way in self.ways[operator.name])
        forward = graph.by_name[operator.forward]
        what, of = operator.of[operand]
        if what == "value":
            return tuple(way.places[of] for way in self.ways[forward.name])
        return tuple(gradient_place(way, of, len(forward.inputs)) for way in self.ways[forward.name])

    def slices(self, operator: Operator, mesh: Mesh) -> int:
        """Return into how many parts an operator's work is cut."""
        if operator.kind == "update":
            places = self.updated[operator.inputs[0]]
            return math.prod(axis.ranks for axis, place in zip(mesh, places, strict=True) if place.kind == "cut")
        ways = self.ways[operator.forward or operator.name]
        return math.prod(axis.ranks for axis, way in zip(mesh, ways, strict=True) if way.cuts)


def options(graph: Graph, group: Group, mesh: Mesh, *, trained: bool) -> tuple[Option, ...]:
    """Return the options of a group: all combinations of its assignments along the axes that sizes allow."""
    by_axis = [assignments(graph, group, axis.ranks) for axis in mesh]
    found: list[Option] = []
    for combination in itertools.product(*by_axis):
        if not _divides(graph, group, combination, mesh):
            continue
        names = [f"{axis.name}:{part.name}" for axis, part in zip(mesh, combination, strict=True)]
        ways = {name: tuple(part.ways[name] for part in combination) for name in combination[0].ways}
        stored = {name: tuple(part.stored[name] for part in combination) for name in combination[0].stored}
        kept = set()
        for keeps in itertools.product(KEEPS if trained and stored else ("",), repeat=len(mesh)):
            weights = {name: _kept(graph, name, places, keeps, mesh, "weights") for name, places in stored.items()}
            state = {name: _kept(graph, name, places, keeps, mesh, "state") for name, places in stored.items()}
            key = (tuple(weights.values()), tuple(state.values()))
            if key in kept:
                continue
            kept.add(key)
            label = [name + (f"+{keep}" if keep else "") for name, keep in zip(names, keeps, strict=True)]
            found.append(Option(" ".join(label), ways, weights, state))
    return tuple(found)


def _divides(graph: Graph, group: Group, combination: Sequence[Assignment], mesh: Mesh) -> bool:
    """Whether every name that several axes cut is a multiple of their product."""
    if len(mesh) == 1:
        return True
    for name in combination[0].ways:
        sizes = graph.by_name[name].sizes
        product: dict[str, int] = {}
        for axis, part in zip(mesh, combination, strict=True):
            way = part.ways[name]
            if way.cuts:
                product[way.name] = product.get(way.name, 1) * axis.ranks
        if any(sizes[key] % count for key, count in product.items()):
            return False
    stored = combination[0].stored
    return all(_fits(graph, name, tuple(part.stored[name] for part in combination), mesh) for name in stored)


def _fits(graph: Graph, name: str, places: Places, mesh: Mesh) -> bool:
    """Whether each part of a value is a multiple of the ranks that cut it."""
    product: dict[Placement, int] = {}
    for axis, place in zip(mesh, places, strict=True):
        if place.kind == "cut":
            product[place] = product.get(place, 1) * axis.ranks
    parts = graph.values[name].parts
    return all(parts[place.dim][place.part] % count == 0 for place, count in product.items())


def _kept(graph: Graph, name: str, places: Places, keeps: Sequence[str], mesh: Mesh, least: str) -> Places:
    """Return where a parameter's weights ("weights") or its gradient and state ("state") are kept.

    Along axes on which it is whole it may be cut: at the first part that ranks divide, or not at all.
    """
    now = list(places)
    for axis, keep in enumerate(keeps):
        if now[axis] != WHOLE or KEEPS.index(keep) < KEEPS.index(least):
            continue
        for dim, parts in enumerate(graph.values[name].parts):
            tries = [(*now[:axis], cut(dim, part), *now[axis + 1 :]) for part in range(len(parts))]
            fitting = [places for places in tries if _fits(graph, name, places, mesh)]
            if fitting:
                now = list(fitting[0])
                break
    return tuple(now)
