"""Axes whose ranks are more than the heads of keys and values: two axes in place of one, heads on the first.

Along the second one, ranks share keys and values and have different queries of a group.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tersor.planner.graph.ir import Graph
from tersor.planner.graph.moves import Axis, Mesh
from tersor.planner.graph.priced import Priced


def split_meshes(graph: Graph, mesh: Mesh) -> tuple[Mesh, ...]:
    """Return the mesh and, for each axis that has more ranks than heads of keys and values, one where it is two."""
    heads = set()
    for operator in graph.operators:
        if operator.kind == "attention" and "heads.1" in operator.sizes:  # keys that a view repeats for a group
            heads.add(operator.sizes["heads.0"])
        elif operator.kind == "attention" and {"heads", "group"} <= set(operator.sizes):
            heads.add(operator.sizes["heads"])
    found = [mesh]
    for place, axis in enumerate(mesh):
        for count in sorted(heads):
            first = math.gcd(count, axis.ranks)
            if 1 < first < axis.ranks and count < axis.ranks:
                other = (*mesh[:place], *split_axis(axis, first), *mesh[place + 1 :])
                found += [other] if other not in found else []
    return tuple(found)


def split_axis(axis: Axis, first: int) -> tuple[Axis, Axis]:
    """Return two axes in place of one, `first` ranks along the first; neighbours are along the second."""
    second = axis.ranks // first
    links = axis.links
    wide = replace(links, stride=links.stride * second) if isinstance(links, Priced) else links
    return Axis(f"{axis.name}.heads", first, wide), Axis(f"{axis.name}.group", second, links)
