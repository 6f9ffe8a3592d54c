"""The options of a group on a mesh: an assignment along each axis; in training, how parameters and state are kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tersor.planner.graph.cuts import Way, gradient_place
from tersor.planner.graph.groups import Assignment, Group, assignments
from tersor.planner.graph.ir import WHOLE, Graph, Operator, Placement, cut
from tersor.planner.graph.moves import Mesh, Places, held
from tersor.planner.graph.shares import fits, largest

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

    def share(self, operator: Operator, mesh: Mesh) -> float:
        """Return what part of an operator's work the rank with most has."""
        names: list[str]
        if operator.kind == "update":
            places = self.updated[operator.inputs[0]]
            names = [operator.dims[0][one.dim][one.part] if one.kind == "cut" else "" for one in places]
        else:
            names = [way.name if way.cuts else "" for way in self.ways[operator.forward or operator.name]]
        cut = [(operator.sizes[name], axis.ranks) for axis, name in zip(mesh, names, strict=True) if name]
        return math.prod(largest(size, ranks) / size if size % ranks else 1 / ranks for size, ranks in cut)


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
    """Whether every name that several axes cut is a multiple of their product; one axis cuts it as `shares` does."""
    if len(mesh) == 1:
        return True
    for name in combination[0].ways:
        sizes = graph.by_name[name].sizes
        ranks: dict[str, list[int]] = {}
        for axis, part in zip(mesh, combination, strict=True):
            way = part.ways[name]
            if way.cuts:
                ranks.setdefault(way.name, []).append(axis.ranks)
        if not all(_shared(sizes[key], counts) for key, counts in ranks.items()):
            return False
    stored = combination[0].stored
    return all(_fits(graph, name, tuple(part.stored[name] for part in combination), mesh) for name in stored)


def _fits(graph: Graph, name: str, places: Places, mesh: Mesh) -> bool:
    """Whether the ranks that cut each part of a value can share it."""
    ranks: dict[Placement, list[int]] = {}
    for axis, place in zip(mesh, places, strict=True):
        if place.kind == "cut":
            ranks.setdefault(place, []).append(axis.ranks)
    parts = graph.values[name].parts
    return all(_shared(parts[place.dim][place.part], counts) for place, counts in ranks.items())


def _shared(size: int, ranks: Sequence[int]) -> bool:
    """Whether axes of so many ranks can cut one part; several do so evenly, so that slices of slices are slices."""
    return fits(size, ranks[0]) if len(ranks) == 1 else size % math.prod(ranks) == 0


def _kept(graph: Graph, name: str, places: Places, keeps: Sequence[str], mesh: Mesh, least: str) -> Places:
    """Return where a parameter's weights ("weights") or its gradient and state ("state") are kept.

    Along axes on which it is whole it may be cut: at the first part of those that leave a rank least, or not at all.
    """
    now = list(places)
    for axis, keep in enumerate(keeps):
        if now[axis] != WHOLE or KEEPS.index(keep) < KEEPS.index(least):
            continue
        value = graph.values[name]
        cuts = [cut(dim, part) for dim, parts in enumerate(value.parts) for part in range(len(parts))]
        tries: list[Places] = [(*now[:axis], place, *now[axis + 1 :]) for place in cuts]
        fitting = [each for each in tries if _fits(graph, name, each, mesh)]
        if fitting:
            smallest: Places = min(fitting, key=lambda each: held(value.bytes, each, mesh, value.parts))
            now = list(smallest)
    return tuple(now)
