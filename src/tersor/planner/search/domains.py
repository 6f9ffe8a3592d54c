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
        open: of each node [options].
    """

    def __init__(self, graph: Graph) -> None:
        """Open everything that is possible at all.

        Raises:
            UnfitError: a node has nothing open.
        """
        self._graph = graph
        self._near: list[list[tuple[int, Mask]]] = [[] for _ in graph.seconds]
        for (one, other), matrix in graph.edges.items():
            possible = np.isfinite(matrix)
            if not possible.all():
                self._near[one].append((other, possible))
                self._near[other].append((one, possible.T))
        self._limited = bool(graph.limits)
        self._start: list[Mask] = [np.isfinite(seconds) for seconds in graph.seconds]
        self.open = list(self._start)
        if not self._propagate(set(range(len(self.open)))):
            raise UnfitError
        self._start = list(self.open)

    def restart(self) -> None:
        """Take all decisions back."""
        self.open = list(self._start)

    def decide(self, node: int, option: int) -> bool:
        """Leave a node one option; return whether every node has one left."""
        own = np.zeros_like(self.open[node])
        own[option] = self.open[node][option]
        self.open[node] = own
        return bool(own.any()) and self._propagate({node})

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
                        self.open[other] = left
                        changed.add(other)
            if not self._limited:
                return True
            floors = [taken[own].min(axis=0) for taken, own in zip(self._graph.bytes, self.open, strict=True)]
            left_over = self._graph.room - np.sum(floors, axis=0)
            if (left_over < 0).any():
                return False
            for node, (taken, own) in enumerate(zip(self._graph.bytes, self.open, strict=True)):
                fits = own & (taken <= left_over + floors[node]).all(axis=1)
                if fits.sum() < own.sum():
                    self.open[node] = fits
                    changed.add(node)
            if not changed:
                return True
