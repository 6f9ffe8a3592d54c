"""What can be decided before a search: the same optimum with fewer limits, options and nodes.

- A limit that no choice can reach, or that another one implies, is dropped.
- An option that no neighbour agrees with, or that leaves too little memory for the least of all others, is impossible.
- An option is dominated where another one takes no more of any limit and is as fast whatever its neighbours choose
  (dead-end elimination as by Goldstein, Biophys. J. 66, 1994).
- An edge whose seconds are a sum of what each end adds belongs to its ends.
- Nodes that imply each other's options become one, a linkage group: one decision takes all that follow from it
  (Auto-MAP, arXiv 2007.04069, prunes a search so).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tersor.planner.problem import Floats
from tersor.planner.search.fold import Graph, Options
from tersor.planner.search.unfit import UnfitError

Bools = npt.NDArray[np.bool_]

ROUNDING = 1e-12
"""Of the largest number of an edge, what its seconds may differ from a sum of two vectors."""


def presolve(graph: Graph) -> Graph:
    """Return a graph with the same optimum, and the same way back to the blocks of the problem.

    Raises:
        UnfitError: a limit is below the least that the blocks take, or a block has no option left.
    """
    return _Presolve(graph).run()


class _Presolve:
    """A graph that is made smaller; edges are kept twice, as each end sees them."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._seconds, self._bytes = list(graph.seconds), list(graph.bytes)
        self._seen: list[dict[int, Floats]] = [{} for _ in graph.seconds]  # node -> neighbour -> [options, its options]
        for (one, other), matrix in graph.edges.items():
            self._seen[one][other], self._seen[other][one] = matrix, matrix.T
        self._kept = [np.arange(size) for size in graph.sizes]  # options of this graph -> those of the given one
        self._alive = [True] * len(graph.seconds)
        self._into = list(range(len(graph.seconds)))
        """The node that each node of the given graph is in; `_kept` is by the options of that node."""
        self._open = list(range(len(graph.limits)))

    def run(self) -> Graph:
        """Reduce until nothing changes, and put what is left together."""
        self._check_limits()
        waiting = set(range(len(self._seconds)))
        while waiting:
            node = waiting.pop()
            if not self._alive[node]:
                continue
            keep = self._possible(node)
            if not keep.any():
                raise UnfitError
            if not keep.all():
                waiting |= self._drop(node, keep)
            waiting |= self._separate(node)
            keep = self._undominated(node)
            if not keep.all():
                waiting |= self._drop(node, keep)
            waiting |= self._link(node)
        self._check_limits()
        return self._result()

    def _check_limits(self) -> None:
        """Refuse what cannot fit, and drop limits that cannot be exceeded or that others imply."""
        alive = [node for node, is_alive in enumerate(self._alive) if is_alive]
        possible = [self._bytes[node][np.isfinite(self._seconds[node])] for node in alive]
        if not all(map(len, possible)):
            raise UnfitError
        self._floors = {node: rows.min(axis=0) for node, rows in zip(alive, possible, strict=True)}
        self._least = np.sum(list(self._floors.values()), axis=0)
        most = np.sum([rows.max(axis=0) for rows in possible], axis=0)
        room = self._graph.room
        if (self._least > room).any():
            raise UnfitError
        self._open = [place for place in self._open if most[place] > room[place]]
        if len(self._open) > 1:
            rows = np.concatenate(possible)
            for place in list(self._open):
                stricter = [other for other in self._open if other != place and room[other] <= room[place]]
                if any((rows[:, other] >= rows[:, place]).all() for other in stricter):
                    self._open.remove(place)

    def _possible(self, node: int) -> Bools:
        """Return which options have a finite time, with some option of every neighbour, and leave others enough."""
        keep = np.isfinite(self._seconds[node])
        for matrix in self._seen[node].values():
            keep &= np.isfinite(matrix).any(axis=1)
        if self._open and keep.any():
            own = self._bytes[node][:, self._open]
            rest = (self._least - self._floors[node])[self._open]
            room = self._graph.room[self._open]
            slack = ROUNDING * np.abs(room)  # sums in another order may differ by that
            keep &= (own + rest <= room + slack).all(axis=1)
        return keep

    def _undominated(self, node: int) -> Bools:
        """Return which options no other one beats whatever is chosen beside."""
        seconds, nbytes = self._seconds[node], self._bytes[node][:, self._open]
        count = len(seconds)
        if count == 1:
            return np.ones(1, dtype=bool)
        worse = seconds[:, None] - seconds[None, :]  # by how much [one] takes longer than [other], at least
        for matrix in self._seen[node].values():
            worse = worse + _least_differences(matrix)
        larger = (nbytes[:, None] >= nbytes[None]).all(axis=2)
        beaten = (worse >= 0) & larger
        keep = np.ones(count, dtype=bool)
        for option in reversed(range(count)):
            others = keep.copy()
            others[option] = False
            keep[option] = not (beaten[option] & others).any()
        return keep

    def _drop(self, node: int, keep: Bools) -> set[int]:
        """Leave a node these options; return who has to be looked at again."""
        self._choose(node, np.flatnonzero(keep))
        self._set_floor(node)
        return {node, *self._seen[node]}

    def _set_floor(self, node: int) -> None:
        """Say anew what a node takes at least of each limit."""
        floor = self._bytes[node].min(axis=0)
        self._least += floor - self._floors[node]
        self._floors[node] = floor

    def _choose(self, node: int, options: Options) -> None:
        """Give a node these of its options, which may stand there several times."""
        self._seconds[node], self._bytes[node] = self._seconds[node][options], self._bytes[node][options]
        for other, matrix in self._seen[node].items():
            self._seen[node][other] = matrix[options]
            self._seen[other][node] = self._seen[node][other].T
        for member, into in enumerate(self._into):
            if into == node:
                self._kept[member] = self._kept[member][options]

    def _separate(self, node: int) -> set[int]:
        """Give edges that are a sum of two vectors to their ends; return the neighbours that were."""
        parted = set()
        for other, matrix in list(self._seen[node].items()):
            if not np.isfinite(matrix).all():
                continue
            own, rest = matrix[:, 0], matrix[0] - matrix[0, 0]
            if np.abs(matrix - own[:, None] - rest[None]).max() <= ROUNDING * np.abs(matrix).max():
                self._seconds[node] = self._seconds[node] + own
                self._seconds[other] = self._seconds[other] + rest
                del self._seen[node][other], self._seen[other][node]
                parted |= {node, other}
        return parted

    def _link(self, node: int) -> set[int]:
        """Take a neighbour in whose option is implied, where that makes no table larger; return who is to be seen."""
        for other, matrix in self._seen[node].items():
            follows = np.isfinite(matrix).sum(axis=1) == 1
            small = matrix.shape[0] == matrix.shape[1] or len(self._seen[other]) <= 2 or matrix.shape[1] == 1
            if follows.all() and small:
                return self._merge(node, other, np.isfinite(matrix).argmax(axis=1))
        return set()

    def _merge(self, node: int, other: int, implied: Options) -> set[int]:
        """Put a neighbour into a node, whose options imply these options of it."""
        self._choose(other, implied)  # now option i of one goes with option i of the other
        self._seconds[node] = self._seconds[node] + self._seconds[other] + self._seen[node][other].diagonal()
        self._bytes[node] = self._bytes[node] + self._bytes[other]
        del self._seen[node][other], self._seen[other][node]
        for third, matrix in self._seen[other].items():
            both = self._seen[node][third] + matrix if third in self._seen[node] else matrix
            self._seen[node][third], self._seen[third][node] = both, both.T
            del self._seen[third][other]
        self._into = [node if into == other else into for into in self._into]
        self._alive[other] = False
        self._least -= self._floors.pop(other)
        self._set_floor(node)
        return {node, *self._seen[node]}

    def _result(self) -> Graph:
        """Return what is left, with new numbers."""
        number = {node: place for place, node in enumerate(node for node, alive in enumerate(self._alive) if alive)}
        edges = {
            (number[node], number[other]): matrix
            for node in number
            for other, matrix in self._seen[node].items()
            if node < other
        }
        graph = self._graph
        return Graph(
            tuple(self._seconds[node] for node in number),
            tuple(self._bytes[node][:, self._open] for node in number),
            edges,
            tuple(graph.limits[place] for place in self._open),
            graph.blocks,
            tuple(number[self._into[place]] for place in graph.places),
            tuple(own[self._kept[place]] for place, own in zip(graph.places, graph.members, strict=True)),
        )


def _least_differences(matrix: Floats) -> Floats:
    """Return [rows, rows], the least of row i minus row j; where both are infinite they do not differ."""
    rows, columns = matrix.shape
    step = max(1, 1_000_000 // (rows * columns))
    parts = []
    for first in range(0, rows, step):
        with np.errstate(invalid="ignore"):
            differences = matrix[first : first + step, None] - matrix[None]
        parts.append(np.where(np.isnan(differences), np.inf, differences).min(axis=2))
    return np.concatenate(parts)
