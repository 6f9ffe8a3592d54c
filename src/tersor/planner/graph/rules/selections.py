"""Rules of operators that pick by index: what is picked from stays whole along that dimension."""

from __future__ import annotations

from collections.abc import Sequence

from tersor.planner.graph.ir import Call, Slot
from tersor.planner.graph.names import Signature
from tersor.planner.graph.rules.base import Namer, rule, shared, whole


@rule("aten.gather")
def gather(call: Call) -> Signature:
    """x and index of one rank: a rank with a part of the places along `dim` has zeros for what the others have."""
    namer, rank = Namer(call), len(call.inputs[0])
    dim = call.args[1] % max(1, rank)
    shared(namer, (0, 1, 2), [other for other in range(rank) if other != dim])
    for operand in (1, 2):
        namer.put("picked", operand, dim)
    namer.put("places", 0, dim)
    return namer.signature("select", sums=("places",), linear=((0,),), saves=(1,), unsplit=("places",))


@rule("aten.index_select")
def index_select(call: Call) -> Signature:
    """x and a vector of indices along `dim`."""
    namer, rank = Namer(call), len(call.inputs[0])
    dim = call.args[1] % rank
    for other in range(rank):
        if other != dim:
            for operand in (0, 2):
                namer.put(f"dim{other}", operand, other)
    for operand, place in ((1, 0), (2, dim)):
        namer.put("picked", operand, place)
    return namer.signature("select", linear=((0,),), saves=(1,))


@rule("aten.scatter", "aten.scatter_add")
def scatter(call: Call) -> Signature:
    """x, index and source of one rank: other dimensions may be cut where all have one size."""
    namer, rank = Namer(call), len(call.inputs[0])
    if any(len(shape) != rank for shape in namer.shapes):
        return whole(call, note=f"{call.name} of these ranks has no rule, so that every rank computes all of it")
    dim = call.args[1] % max(1, rank)
    operands = range(len(namer.shapes))
    shared(namer, operands, [other for other in range(rank) if other != dim])
    added = call.name.startswith("aten.scatter_add")
    return namer.signature("select", linear=((0, 2),) if added else (), saves=(1,))


def _indexed(indices: Sequence[object]) -> list[int]:
    return [dim for dim, index in enumerate(indices) if index is not None]


@rule("aten.index")
def index(call: Call) -> Signature:
    """x and indices of some of its dimensions, broadcast together: they stand where those were if they lie together."""
    namer, output = Namer(call), len(call.inputs)
    indices = call.args[1]
    places = _indexed(indices)
    together = places == list(range(places[0], places[-1] + 1))
    rank = max(len(call.inputs[slot.index]) for slot in indices if isinstance(slot, Slot))
    start = places[0] if together else 0
    for dim in range(rank):
        namer.put(f"picked{dim}", output, start + dim)
        for slot in indices:
            if isinstance(slot, Slot):
                mine = dim - (rank - len(call.inputs[slot.index]))
                if mine >= 0:
                    namer.put(f"picked{dim}", slot.index, mine)
    others = [dim for dim in range(len(call.inputs[0])) if dim not in places]
    for dim in others:
        before = sum(other < dim for other in others)
        place = before if together and dim < start else rank + before
        for operand, mine in ((0, dim), (output, place)):
            namer.put(f"dim{dim}", operand, mine)
    return namer.signature("select", linear=((0,),), saves=range(1, output))


@rule("aten.index_put")
def index_put(call: Call) -> Signature:
    """x, indices of its first dimensions, and values: dimensions behind those may be cut where values have them."""
    namer, output = Namer(call), len(call.inputs)
    places = _indexed(call.args[1])
    values = output - 1
    if places == list(range(len(places))):
        rank = len(call.inputs[0])
        for dim in range(len(places), rank):
            mine = len(call.inputs[values]) - (rank - dim)
            if mine >= 0 and call.inputs[values][mine] == call.inputs[0][dim]:
                for operand, place in ((0, dim), (output, dim), (values, mine)):
                    namer.put(f"dim{dim}", operand, place)
    return namer.signature("select", linear=((0, values),), saves=range(1, values))
