"""How many pages will the requests that run need at most? What admission asks before it lets the next one in.

Prompts are known, answers are not: each is taken to draw its `max_tokens` times a quantile of what earlier ones drew
of theirs. Requests grow together, and each gives its pages back when it ends, so that the most pages are in use at the
end of one of them: just before, all that end no earlier have grown by as much (Past-Future Scheduler, ASPLOS 2025).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tersor.engine.groups import Pins, Plan
from tersor.engine.prefix_tree import Integers
from tersor.errors import InputError

_BINS = 128


class OutputLengths:
    """What part of their `max_tokens` requests draw: a running quantile, 1 until one has ended."""

    def __init__(self, quantile: float = 0.9) -> None:
        if not 0 < quantile <= 1:
            raise InputError(f"quantile is {quantile}: it must be above 0 and at most 1")
        self._quantile = quantile
        self._counts = np.zeros(_BINS, dtype=np.int64)

    def observe(self, drawn: int, most: int) -> None:
        """Note that a request that may draw `most` tokens ended after `drawn`."""
        self._counts[min(_BINS, max(1, -(-drawn * _BINS // most))) - 1] += 1

    @property
    def ratio(self) -> float:
        """The quantile, rounded up to one in 128."""
        total = int(self._counts.sum())
        if not total:
            return 1.0
        return (int(np.searchsorted(np.cumsum(self._counts), self._quantile * total)) + 1) / _BINS

    def expected(self, most: ArrayLike, drawn: ArrayLike = 0) -> Integers:
        """Return how many tokens requests will draw in all: at least one more than they have, at most `most`."""
        limits = np.asarray(most, dtype=np.int64)
        guess = np.ceil(limits * self.ratio).astype(np.int64)
        return np.minimum(np.maximum(guess, np.asarray(drawn, dtype=np.int64) + 1), limits)


class Admission:
    """Which requests of a plan run, and the most pages that they will need together.

    A prompt's own pages count from its admission; pages of a shared prefix from that of its first request until the
    last that needs them ends, so for as long as one of them waits.
    """

    def __init__(self, plan: Plan, pages: int, most: ArrayLike, lengths: OutputLengths | None = None) -> None:
        """Begin with nothing admitted.

        Args:
            plan: of all requests.
            pages: how many there are.
            most: int64 [M]: `max_tokens` of each position, or one number for all; 0 of those that draw nothing.
            lengths: what was learnt of earlier requests; `None` begins anew.
        """
        self.pages, self.lengths = pages, lengths or OutputLengths()
        self._plan, self._pins = plan, Pins(plan)
        self._most = np.broadcast_to(np.asarray(most, dtype=np.int64), plan.order.shape)
        self._drawn = np.zeros(plan.order.size, dtype=np.int64)
        self._own = plan.lengths - plan.depths[plan.nodes]
        self._running: dict[int, None] = {}
        self._waiting = (plan.stops - plan.firsts).tolist()  # of each node, positions that were not admitted
        self._resident: dict[int, None] = {}
        # Pages that everybody needs who draws all that it may, without a look at who ends when.
        self._whole = (-(-(self._own + self._most) // plan.page)).tolist()
        self._node_sizes = self._sizes(list(range(plan.parents.size))).tolist()
        self._bound = 0

    def high_water(self, *more: int) -> int:
        """Return the most pages that will be in use if `more` positions are admitted now and nothing after them."""
        running = np.array([*self._running, *more], dtype=np.int64)
        if not running.size:
            return int(sum(self._sizes(list(self._resident))))
        drawn = self._drawn[running]
        left = self.lengths.expected(self._most[running], drawn) - drawn
        ends = np.unique(left)[::-1]
        longest_first = np.argsort(-left, kind="stable")
        tokens = np.cumsum((self._own[running] + drawn + self._plan.page - 1)[longest_first])  # page - 1: rounded up
        count = np.searchsorted(-left[longest_first], -ends, side="right")
        pages = (tokens[count - 1] + count * ends) // self._plan.page
        shared, until = self._shared(running, left, more)
        if shared.size:
            order = np.argsort(-until, kind="stable")
            sums = np.concatenate([[0], np.cumsum(shared[order])])
            pages = pages + sums[np.searchsorted(-until[order], -ends, side="right")]
        return int(pages.max())

    def fits(self, position: int) -> bool:
        """Whether the pages suffice, as far as can be foreseen, if this position is admitted now."""
        new = sum(self._node_sizes[node] for node in self._plan.path(position) if node not in self._resident)
        if self._bound + self._whole[position] + new <= self.pages:
            return True
        return self.high_water(position) <= self.pages

    def admit(self, position: int) -> None:
        """Note that a position runs from now on."""
        self._running[position] = None
        self._bound += self._whole[position]
        for node in self._plan.path(position):
            self._waiting[node] -= 1
            if node not in self._resident:
                self._resident[node] = None
                self._bound += self._node_sizes[node]

    def drew(self, position: int, count: int = 1) -> None:
        """Note that a position that runs has so many more tokens."""
        self._drawn[position] += count

    def end(self, position: int) -> list[int]:
        """Note that a position that ran ended, and return the nodes whose pages are free now, the deepest first."""
        del self._running[position]
        self._bound -= self._whole[position]
        if self._most[position]:  # it was to draw
            self.lengths.observe(int(self._drawn[position]), int(self._most[position]))
        freed = self._pins.end(position)
        for node in freed:
            del self._resident[node]
            self._bound -= self._node_sizes[node]
        return freed

    def _sizes(self, nodes: list[int]) -> NDArray[np.int64]:
        places = np.array(nodes, dtype=np.int64)
        return (self._plan.depths[places] - self._plan.depths[self._plan.parents[places]]) // self._plan.page

    def _shared(self, running: Integers, left: Integers, more: tuple[int, ...]) -> tuple[Integers, Integers]:
        """Return the pages of each shared prefix that is or will be there, and after how many tokens the last ends."""
        joined = dict.fromkeys(self._resident, 0)
        for position in more:
            for node in self._plan.path(position):
                joined[node] = joined.get(node, 0) + 1
        until = np.zeros(self._plan.parents.size, dtype=np.int64)
        np.maximum.at(until, self._plan.nodes[running], left)
        nodes = sorted(joined, reverse=True)  # a parent stands before its children
        forever = left.max()
        for node in nodes:
            if self._waiting[node] > joined[node]:
                until[node] = forever
            parent = self._plan.parents[node]
            until[parent] = max(until[parent], until[node])
        return self._sizes(nodes), until[nodes]
