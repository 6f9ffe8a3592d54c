"""The ways to cut an operator along one mesh axis: where its inputs must be, and where its outputs then are."""

from __future__ import annotations

from dataclasses import dataclass

from tersor.planner.graph.ir import SUM, WHOLE, Operator, Placement, cut
from tersor.planner.graph.shares import fits

EVERYWHERE = "whole"
"""The way in which every rank computes all of it."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to cut an operator along one axis.

    Attributes:
        name: "whole", the name along which it is cut, or "sum" with the inputs that are pending.
        places: where each operand is, inputs first.
    """

    name: str
    places: tuple[Placement, ...]

    @property
    def cuts(self) -> bool:
        """Whether each rank computes a part."""
        return self.name != EVERYWHERE and not self.name.startswith("sum ")


def place_of(operator: Operator, operand: int, name: str) -> Placement | None:
    """Return the cut of an operand along a name, or `None` if it has no such dimension."""
    for dim, names in enumerate(operator.dims[operand]):
        if name in names:
            return cut(dim, names.index(name))
    return None


def ways(operator: Operator, ranks: int, *, sums: bool = True) -> tuple[Way, ...]:
    """Return the ways of an operator that is no gradient, that of every rank computing all of it first.

    A name may be cut if ranks can share its size (`shares.fits`). With `sums` false, pending sums are read by no
    product: that would compute on every rank what one computes.
    """
    count, inputs = len(operator.operands), len(operator.inputs)
    found = [Way(EVERYWHERE, (WHOLE,) * count)]
    for name in operator.cuts:
        if not fits(operator.sizes[name], ranks):
            continue
        places = []
        contracted = name in operator.sums
        for operand in range(count):
            place = place_of(operator, operand, name)
            if place is None and operand >= inputs:
                place = SUM if contracted else WHOLE
            elif place is None:
                place = SUM if contracted and operand in operator.addends else WHOLE
            places.append(place)
        if not contracted and any(place == WHOLE for place in places[inputs:]) and not _for_nothing(operator, name):
            continue
        found.append(Way(name, tuple(places)))
    if sums or operator.kind not in ("matmul", "convolution", "attention"):
        for group in operator.linear:
            held = tuple(SUM if operand in group else WHOLE for operand in range(inputs))
            outputs = (SUM,) * (count - inputs)
            found.append(Way(f"sum {'+'.join(map(str, group))}", held + outputs))
    return tuple(found)


def _for_nothing(operator: Operator, name: str) -> bool:
    """Whether outputs without this name hold no numbers, as statistics of a norm in inference do."""
    inputs = len(operator.inputs)
    shapes = operator.call.outputs if operator.call is not None else ()
    return all(
        place_of(operator, inputs + output, name) is not None or 0 in shape for output, shape in enumerate(shapes)
    )


def gradient_place(way: Way, operand: int, inputs: int) -> Placement:
    """Return where the gradient of an operand is when its operator, of so many inputs, is cut in this way.

    An operator that computes slices of its outputs from slices of some inputs and the whole of others gives slices of
    the former's gradients, and addends of the latter's. One whose outputs are pending sums reads their whole gradient.
    """
    place = way.places[operand]
    if place.kind == "cut":
        return place
    return SUM if operand < inputs and place == WHOLE and way.name != EVERYWHERE else WHOLE


def gradient_way(way: Way, operator: Operator, gradient: Operator) -> Way:
    """Return how the gradient of an operator is cut when the operator is cut in this way."""
    inputs = len(operator.inputs)
    places = tuple(
        gradient_place(way, operand, inputs) if what == "gradient" else way.places[operand]
        for what, operand in gradient.of
    )
    return Way(way.name, places)
