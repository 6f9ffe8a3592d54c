"""The least sum over a graph, exactly: a dynamic programme that takes one node out after the other.

To take a node out, its seconds, its edges and what earlier nodes left behind are added up for every option of it and of
its neighbours; the least over its own options is left behind for them (non-serial dynamic programming, Bertele and
Brioschi, 1972). On a chain this is the usual programme from layer to layer; on any graph its cost is the largest table,
which the order of nodes keeps small: next is always the one whose neighbours lack fewest edges between each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tersor.errors import InputError
from tersor.planner.problem import Floats
from tersor.planner.search.fold import Options

LARGEST, MOST = 2**24, 2**27
"""Entries of a table, 128 MB, and of all of them."""

KEPT = 2**22
"""Entries of tables whose edges are added up once."""


class Tables:
    """What one elimination computed.

    Attributes:
        least: the least sum.
        each: of every node in the order in which they are taken out, [options of its neighbours ..., its own].
    """

    def __init__(self, least: float, each: list[Floats]) -> None:
        self.least = least
        self.each = each


class Elimination:
    """An order of a graph's nodes, and the shapes that sums take in it; made once for any number of costs.

    Attributes:
        order: nodes as they are taken out.
        beside: of every node in that order, its neighbours when it is taken out.
        entries: of all tables together.
        largest: of one table.
    """

    def __init__(self, sizes: Sequence[int], edges: Mapping[tuple[int, int], Floats]) -> None:
        """Find the order.

        Args:
            sizes: options of every node.
            edges: pairs of nodes, and their seconds.
        """
        self._sizes, self._edges = list(sizes), edges
        self.order, near = _order(sizes, edges)
        position = {node: place for place, node in enumerate(self.order)}
        # Everywhere nodes stand in one order, the last to be taken out first, so that tables need no transposition.
        self.beside = [sorted(near[node], key=lambda other: -position[other]) for node in self.order]
        shapes = [
            [*(sizes[other] for other in own), sizes[node]] for node, own in zip(self.order, self.beside, strict=True)
        ]
        self.entries = sum(math.prod(shape) for shape in shapes)
        self.largest = max((math.prod(shape) for shape in shapes), default=1)
        self._shapes = shapes
        self._pairs: list[list[tuple[Floats, tuple[int, ...]]]] = [[] for _ in self.order]
        for (one, other), matrix in edges.items():
            first, second, seen = (one, other, matrix.T) if position[one] < position[other] else (other, one, matrix)
            place = position[first]
            self._pairs[place].append((seen, self._spread(place, [second, first])))
        self._kept: tuple[list[Floats | None], list[Floats | None]] = ([None] * len(shapes), [None] * len(shapes))
        self._left: list[tuple[int, tuple[int, ...]] | None] = []
        """Where what a node leaves behind is added, and in which shape; None for a number alone."""
        for own in self.beside:
            place = min((position[other] for other in own), default=-1)
            self._left.append((place, self._spread(place, own)) if own else None)

    @property
    def too_wide(self) -> bool:
        """Whether a table would have more than `LARGEST` entries, or all of them more than `MOST`."""
        return self.largest > LARGEST or self.entries > MOST

    def _spread(self, place: int, nodes: Sequence[int]) -> tuple[int, ...]:
        """Return the shape in which a table over these nodes is added to that of the node at a place."""
        scope = [*self.beside[place], self.order[place]]
        return tuple(self._sizes[node] if node in nodes else 1 for node in scope)

    def solve(self, costs: Sequence[Floats], with_edges: bool = True) -> Tables:
        """Return the least sum and the tables that tell where it is.

        Args:
            costs: of every node [options].
            with_edges: whether seconds of edges count; else only that some are infinite.

        Raises:
            InputError: the tables would be too large.
        """
        if self.too_wide:
            raise InputError(
                f"an exact programme would need tables of {self.entries:,} entries, up to {self.largest:,} in one, and "
                f"takes {MOST:,} and {LARGEST:,}: too many blocks depend on each other at once; use the full search"
            )
        tables = []
        behind: list[list[tuple[Floats, tuple[int, ...]]]] = [[] for _ in self.order]
        least = 0.0
        for place, node in enumerate(self.order):
            table = self._sums(place, with_edges) + costs[node]
            for summand, shape in behind[place]:
                table += summand.reshape(shape)
            tables.append(table)
            left = self._left[place]
            if left is None:
                least += float(table.min(axis=-1))
            else:
                behind[left[0]].append((table.min(axis=-1), left[1]))
        return Tables(least, tables)

    def _sums(self, place: int, with_edges: bool) -> Floats:
        """Return the seconds of edges in the table of a node, or where they are infinite; kept for the next costs."""
        kept = self._kept[with_edges][place]
        if kept is None:
            kept = np.zeros(self._shapes[place])
            for matrix, shape in self._pairs[place]:
                kept += (matrix if with_edges else np.where(np.isfinite(matrix), 0.0, np.inf)).reshape(shape)
            if self.entries <= KEPT:
                self._kept[with_edges][place] = kept
        return kept

    def best(self, tables: Tables) -> Options:
        """Return the option of every node at the least sum."""
        options = np.zeros(len(self._sizes), dtype=np.int64)
        for node, own, table in zip(reversed(self.order), reversed(self.beside), reversed(tables.each), strict=True):
            options[node] = table[tuple(options[other] for other in own)].argmin()
        return options


def _order(sizes: Sequence[int], edges: Mapping[tuple[int, int], Floats]) -> tuple[list[int], dict[int, set[int]]]:
    """Return nodes in an order of least fill, and the neighbours of each when its turn comes."""
    near: dict[int, set[int]] = {node: set() for node in range(len(sizes))}
    for one, other in edges:
        near[one].add(other)
        near[other].add(one)

    def rank(node: int) -> tuple[int, int, int]:
        own = near[node]
        lacking = sum(len(own) - 1 - len(near[other] & own) for other in own) // 2
        return lacking, math.prod(sizes[other] for other in own) * sizes[node], node

    ranks = {node: rank(node) for node in near}
    order, then = [], {}
    while ranks:
        node = min(ranks, key=ranks.__getitem__)
        del ranks[node]
        own = near[node]
        order.append(node)
        then[node] = set(own)
        for other in own:
            near[other] = (near[other] | own) - {node, other}
        touched = set(own).union(*(near[other] for other in own)) if own else set()
        for other in touched & ranks.keys():
            ranks[other] = rank(other)
    return order, then
