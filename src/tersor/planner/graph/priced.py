"""The links of an axis of a mesh by the tables of a chip: which of its ranks share a node, and what exchanges take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tersor.errors import InputError
from tersor.planner import links as tables
from tersor.planner.graph.moves import Axis, Mesh


@dataclass(frozen=True, slots=True)
class Priced:
    """An axis whose ranks lie in nodes as a mesh in row-major order lays them out.

    Attributes:
        links: tables of a chip.
        stride: devices from a rank to the next one along the axis.
    """

    links: tables.Links
    stride: int
    _nodes: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)

    def nodes(self, ranks: int) -> tuple[int, ...]:
        """Return how many of so many ranks each node has."""
        if ranks not in self._nodes:
            found: dict[int, int] = {}
            for rank in range(ranks):
                node = rank * self.stride // self.links.reach
                found[node] = found.get(node, 0) + 1
            self._nodes[ranks] = tuple(found.values())
        return self._nodes[ranks]

    def _seconds(self, operation: str, size: float, ranks: int) -> float:
        return self.links.exchange(operation, math.ceil(size), self.nodes(ranks)).seconds

    def all_reduce(self, size: float, ranks: int) -> float:
        """Every rank has an addend of `size` bytes, and then the sum."""
        return self._seconds(tables.ALL_REDUCE, size, ranks)

    def all_gather(self, size: float, ranks: int) -> float:
        """Every rank has a part, and then all `size` bytes."""
        return self._seconds(tables.ALL_GATHER, size, ranks)

    def reduce_scatter(self, size: float, ranks: int) -> float:
        """Every rank has an addend of `size` bytes, and then a part of the sum."""
        return self._seconds(tables.REDUCE_SCATTER, size, ranks)

    def all_to_all(self, size: float, ranks: int) -> float:
        """Every rank has `size` bytes, and gives every other an equal part of them."""
        return self._seconds(tables.ALL_TO_ALL, size, ranks)

    def send(self, size: float) -> float:
        """A rank hands `size` bytes to the next one."""
        far = self.stride >= self.links.reach
        return self.links.exchange(tables.SEND, math.ceil(size), (1, 1) if far else (2,)).seconds


def mesh_of(axes: Mapping[str, int], links: tables.Links) -> Mesh:
    """Return a mesh of named axes, the last one of neighbours; nodes are full.

    Raises:
        InputError: there is no axis, or one has no ranks.
    """
    if not axes or any(ranks < 1 for ranks in axes.values()):
        raise InputError("a mesh needs at least one axis, and every axis at least one rank")
    found, stride = [], math.prod(axes.values())
    for name, ranks in axes.items():
        stride //= ranks
        found.append(Axis(name, ranks, Priced(links, stride)))
    return tuple(found)
