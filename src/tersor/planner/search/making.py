"""A plan made decision by decision, as a player makes moves: what is seen, what may be done, and what it costs.

Nodes are decided in the order of the model. A decision closes what it rules out (`Domains`), and nodes with one option
left are decided with it, so that one move takes all that follows from it.
"""

from __future__ import annotations

import numpy as np

from tersor.planner.problem import Floats
from tersor.planner.search.domains import Domains, Mask
from tersor.planner.search.fold import Graph, Options
from tersor.planner.search.unfit import UnfitError

DEAD_END = -3.0
"""Reward of a plan that cannot be finished, for each node that is left: more than most nodes can cost."""


class Making:
    """One plan at a time, from nothing decided to everything.

    Attributes:
        plan: options of nodes, as far as they are decided.
        width: numbers of what is seen.
        actions: the most options of a node.
        node: the one that is decided next; the number of nodes at the end.
        whole: whether what is decided can go together, as far as it is seen.
    """

    def __init__(self, graph: Graph) -> None:
        """Begin the first plan.

        Raises:
            UnfitError: nothing goes together.
        """
        self._graph, self._domains = graph, Domains(graph)
        count = len(graph.seconds)
        self.actions = max(graph.sizes)
        self.width = count * (2 * self.actions + 1) + len(graph.limits)
        self._where = np.arange(self.actions) < np.array(graph.sizes)[:, None]
        self._back: list[list[tuple[int, Floats]]] = [[] for _ in graph.seconds]
        for (one, other), matrix in graph.edges.items():
            self._back[other].append((one, matrix))
        tables = [*graph.seconds, *graph.edges.values()]
        spread = sum(float(np.ptp(table[np.isfinite(table)])) for table in tables)
        self._unit = spread / count or 1.0
        self._floors = [float(seconds.min()) for seconds in graph.seconds]
        for (_, other), matrix in graph.edges.items():
            self._floors[other] += float(matrix.min())
        self.restart()
        if not self.whole:
            raise UnfitError

    def restart(self) -> None:
        """Begin a new plan."""
        self._domains.restart()
        self.plan: Options = np.full(len(self._graph.seconds), -1, dtype=np.int64)
        self._taken = np.zeros(len(self._graph.limits))
        self.node, self.whole = 0, True
        self._follow()

    @property
    def done(self) -> bool:
        """Whether every node is decided, and they go together."""
        return self.whole and self.node == len(self.plan)

    def seen(self) -> Floats:
        """[width], what is decided and what is open of every node, who is next, and parts of limits that are taken."""
        count = len(self.plan)
        state = np.zeros(self.width, dtype=np.float64)
        table = state[: 2 * count * self.actions].reshape(2, count, self.actions)
        decided = np.flatnonzero(self.plan[: self.node] >= 0)
        table[0, decided, self.plan[decided]] = 1.0
        table[1][self._where] = self._domains.flat
        if not self.done:
            state[2 * count * self.actions + self.node] = 1.0
        state[2 * count * self.actions + count :] = self._taken / np.maximum(np.abs(self._graph.room), 1.0)
        return state

    def allowed(self) -> Mask:
        """[actions], the options that are open."""
        allowed = np.zeros(self.actions, dtype=np.bool_)
        if not self.done:
            own = self._domains.open[self.node]
            allowed[: len(own)] = own
        return allowed

    def decide(self, option: int) -> tuple[float, bool]:
        """Choose the next node's option; return the reward and whether the plan ends, whole or not."""
        reward = self._place(option) + self._follow()
        if not self.whole:
            return reward + DEAD_END * (len(self.plan) - self.node + 1), True
        return reward, self.done

    def _follow(self) -> float:
        """Decide nodes as long as the next one has one option left."""
        reward = 0.0
        while self.whole and not self.done and self._domains.open[self.node].sum() == 1:
            reward += self._place(int(self._domains.open[self.node].argmax()))
        return reward

    def _place(self, option: int) -> float:
        """Decide one node; return its seconds above the least, in units of what a node makes out, as a reward."""
        node, graph = self.node, self._graph
        seconds = float(graph.seconds[node][option])
        seconds += sum(float(matrix[self.plan[other], option]) for other, matrix in self._back[node])
        self.plan[node] = option
        self._taken = self._taken + graph.bytes[node][option]
        self.node += 1
        self.whole = self._domains.decide(node, option)
        return -(seconds - self._floors[node]) / self._unit
