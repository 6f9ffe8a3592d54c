"""Options that are still open while a plan is made decision by decision: each decision rules out what it implies.

After a decision every option that has no partner left among a neighbour's, or that leaves others too little of a limit,
is closed, and so on until nothing changes (arc consistency). What is open may still lead nowhere, where three blocks or
two limits have to be seen at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tersor.planner.search.fold import Graph
from tersor.planner.search.unfit import UnfitError

Mask = npt.NDArray[np.bool_]


class Domains:
    """Which options of every node are open.

    Attributes:
        flat: of all options, node after node.
        open: of each node [options], parts of `flat`.
    """

    def __init__(self, graph: Graph) -> None:
        """Open everything that is possible at all.

        Raises:
            UnfitError: a node has nothing open.
        """
        self._room = graph.room
        self._near: list[list[tuple[int, Mask]]] = [[] for _ in graph.seconds]
        for (one, other), matrix in graph.edges.items():
            possible = np.isfinite(matrix)
            if not possible.all():
                self._near[one].append((other, possible))
                self._near[other].append((one, possible.T))
        self._first = np.cumsum([0, *graph.sizes[:-1]])
        self._node = np.repeat(np.arange(len(graph.sizes)), graph.sizes)
        self._bytes = np.concatenate(graph.bytes)
        self.flat: Mask = np.isfinite(np.concatenate(graph.seconds))
        self.open: list[Mask] = np.split(self.flat, self._first[1:])
        if not self._propagate(set(range(len(self.open)))):
            raise UnfitError
        self._start = self.flat.copy()

    def restart(self) -> None:
        """Take all decisions back."""
        self.flat[:] = self._start

    def decide(self, node: int, option: int) -> bool:
        """Leave a node one option; return whether every node has one left."""
        was = bool(self.open[node][option])
        self.open[node][:] = False
        self.open[node][option] = was
        return was and self._propagate({node})

    def _propagate(self, changed: set[int]) -> bool:
        """Close what decisions imply; return whether every node has an option left."""
        while True:
            while changed:
                node = changed.pop()
                for other, possible in self._near[node]:
                    left = self.open[other] & possible[self.open[node]].any(axis=0)
                    if not left.any():
                        return False
                    if left.sum() < self.open[other].sum():
                        self.open[other][:] = left
                        changed.add(other)
            if not len(self._room):
                return True
            floors = np.minimum.reduceat(np.where(self.flat[:, None], self._bytes, np.inf), self._first)
            spare = self._room - floors.sum(axis=0)
            if (spare < 0).any():
                return False
            closed = self.flat & (self._bytes > (spare + floors)[self._node]).any(axis=1)
            if not closed.any():
                return True
            self.flat &= ~closed
            changed = set(self._node[closed].tolist())
