"""How many pages will the requests that run need, and when? What admission asks before it lets the next one in.

Prompts are known, answers are not: each is taken to draw its `max_tokens` times a quantile of what earlier ones drew
of theirs. Requests grow together, and each gives its pages back when it ends, so that the most pages are in use at the
end of one of them: just before, all that end no earlier have grown by as much (Past-Future Scheduler, ASPLOS 2025).

One that would lose its pages before its end may still be worth admitting: what it draws until then need not be drawn in
a later step that few rows share, and what it has to compute again are the tokens of its text so far.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tersor.engine.groups import Pins, Plan
from tersor.engine.prefix_tree import Integers
from tersor.errors import InputError

STEP, LEAST = 49, 91
"""What a step takes beside its tokens, and at least, in tokens of prompts that take as long: of 8B on an H200."""

PATIENCE = 16
"""Steps after which a request that did not fit is looked at again, though none has ended."""

_WAVES, _STRETCHES = 3, 20
"""How often those that wait have to fill the pages for ages to be spread, and the parts of a life that are counted."""

_BINS = 128
_FOREVER = 1 << 62


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
    """Which requests of a plan run, and the pages that they will need together.

    A prompt's own pages count from its admission; pages of a shared prefix from that of its first request until the
    last that needs them ends, so for as long as one of them waits. Each position runs as one row or as several, its
    continuations, which draw side by side and share the full pages of the prompt.
    """

    def __init__(
        self,
        plan: Plan,
        pages: int,
        most: ArrayLike,
        lengths: OutputLengths | None = None,
        *,
        rows: ArrayLike = 1,
    ) -> None:
        """Begin with nothing admitted.

        Args:
            plan: of all requests.
            pages: how many there are.
            most: int64 [M]: tokens that all rows of each position may draw, or one number for all; 0 of those that draw
                nothing.
            lengths: what was learnt of earlier requests; `None` begins anew.
            rows: int64 [M]: of each position, at least 1, or one number for all.
        """
        self.pages, self.lengths = pages, lengths or OutputLengths()
        self._plan, self._pins = plan, Pins(plan)
        self._most = np.broadcast_to(np.asarray(most, dtype=np.int64), plan.order.shape)
        self._rows = np.broadcast_to(np.asarray(rows, dtype=np.int64), plan.order.shape)
        self._lives = -(-self._most // self._rows)  # tokens that each row may draw
        self._drawn = np.zeros(plan.order.size, dtype=np.int64)
        self._own = plan.lengths - plan.depths[plan.nodes]
        self._together = np.where(self._rows > 1, self._own // plan.page * plan.page, 0)  # of the own tokens
        self._running: dict[int, None] = {}
        self._active = self._rows.copy()  # of each position, rows that have pages
        self._each = np.zeros(plan.order.size, dtype=np.int64)  # tokens that each of them has drawn
        self._away = self._next = 0
        self._waiting = (plan.stops - plan.firsts).tolist()  # of each node, positions that were not admitted
        self._resident: dict[int, None] = {}
        # Pages that everybody needs at its begin, and who draws all that it may, without a look at who ends when.
        rest = self._own - self._together
        self._begin = (self._rows * -(-rest // plan.page) + self._together // plan.page).tolist()
        self._whole = (self._rows * -(-(rest + self._lives) // plan.page) + self._together // plan.page).tolist()
        self._node_sizes = self._sizes(list(range(plan.parents.size))).tolist()
        self._bound = 0
        # Rows that there are on average where a position and all after it run together, as far as the longest draws.
        longest = np.maximum.accumulate(self._lives[::-1])[::-1]
        self._later = (np.cumsum(self._most[::-1])[::-1] / np.maximum(1, longest)).tolist()

    def high_water(self, *more: int) -> int:
        """Return the most pages that will be in use if `more` positions are admitted now and nothing after them."""
        return int(self._foreseen(more)[1].max())

    def lasts(self, *more: int) -> int:
        """Return after how many steps pages do not suffice if `more` are admitted now; 2^62 where they always do."""
        ends, pages, rows = self._foreseen(more)
        over = np.flatnonzero(pages > self.pages)
        if not over.size:
            return _FOREVER
        place = int(over[-1])  # the earliest: ends descend
        earlier = int(ends[place + 1]) if place + 1 < ends.size else 0
        excess = int(pages[place] - self.pages) * self._plan.page
        return max(earlier, int(ends[place]) - -(-excess // max(1, int(rows[place]))))

    def admits(self, position: int) -> bool:
        """Whether a position that nobody is before should be admitted now."""
        return not self.crowds(position) and (self.fits(position) or self.pays(position))

    def fits(self, position: int) -> bool:
        """Whether the pages suffice, as far as can be foreseen, if this position is admitted now."""
        new = sum(self._node_sizes[node] for node in self._plan.path(position) if node not in self._resident)
        if self._bound + self._whole[position] + new <= self.pages:
            return True
        return self.high_water(position) <= self.pages

    def crowds(self, position: int) -> bool:
        """Whether a position should wait lest too many end together.

        Requests that begin together need their last pages together, and most pages are idle before. Where the rest fill
        the pages a few times over, no more begin in a stretch of a long life than would if ages were spread evenly.
        Where few rows fit, losing pages costs less than that.
        """
        begin, whole, rows = self._begin[position], self._whole[position], int(self._rows[position])
        waves = self._later[position] * whole / (rows * self.pages)
        if waves < _WAVES or whole < 2 * begin or self.pages * rows < (LEAST - STEP) * whole:
            return False
        life = int(self.lengths.expected(self._lives[position]))
        stretch = life // _STRETCHES
        if stretch < PATIENCE:
            return False
        free = self.pages - sum(self._node_sizes[node] for node in self._resident)
        even = 2 * free * stretch * whole // (life * (begin + whole))
        if even < whole:
            return False
        running = np.array(list(self._running), dtype=np.int64)
        left = self.lengths.expected(self._lives[running], self._each[running]) - self._each[running]
        near = running[abs(left - life) < stretch].tolist()
        return sum(self._whole[one] for one in near) + whole > even

    def pays(self, position: int) -> bool:
        """Whether admitting a position that does not fit saves more than computing it again costs, if that comes."""
        rows = int(self._rows[position])
        together = int(self._together[position])
        tokens = together + rows * (int(self._own[position]) - together)
        return self._gains(rows, self.lasts(position), tokens, position)

    def returns(self, position: int, tokens: int) -> bool:
        """Whether one row of a position that lost its pages should have some again, to compute so many tokens."""
        self._active[position] += 1
        steps = self.lasts()
        self._active[position] -= 1
        return self._gains(1, steps, tokens, self._next)

    def stands(self, position: int, active: int, drawn: int) -> None:
        """Note how many rows of a position that runs have pages, and how many tokens each of them has drawn."""
        self._active[position], self._each[position] = active, drawn

    def lost(self, away: int) -> None:
        """Note how many rows of all positions that run have lost their pages."""
        self._away = away

    def admit(self, position: int) -> None:
        """Note that a position runs from now on: the first of those that wait."""
        self._running[position] = None
        self._next = position + 1
        self._bound += self._whole[position]
        for node in self._plan.path(position):
            self._waiting[node] -= 1
            if node not in self._resident:
                self._resident[node] = None
                self._bound += self._node_sizes[node]

    def drew(self, position: int, count: int = 1) -> None:
        """Note that a position that runs has so many more tokens."""
        self._drawn[position] += count
        self._each[position] = -(-self._drawn[position] // self._rows[position])

    def end(self, position: int) -> list[int]:
        """Note that a position that ran ended, and return the nodes whose pages are free now, the deepest first."""
        del self._running[position]
        self._bound -= self._whole[position]
        if self._drawn[position]:  # else it was to draw nothing, or was refused, which says nothing of others
            self.lengths.observe(int(self._drawn[position]), int(self._most[position]))
        freed = self._pins.end(position)
        for node in freed:
            del self._resident[node]
            self._bound -= self._node_sizes[node]
        return freed

    def _gains(self, begun: int, steps: int, tokens: int, following: int) -> bool:
        """Whether what rows that begin draw in so many steps is worth computing again, and so many tokens with it.

        A token drawn now is not drawn later, in steps of as many rows as there are now, or as are left then: those of
        `following` and all after it, and those that have lost their pages.
        """
        if steps == _FOREVER:
            return True
        now = int(self._active[list(self._running)].sum())
        later = (self._later[following] if following < len(self._later) else 0.0) + self._away
        rows = max(1.0, min(now, later))
        longer = _cost(now + begun) - _cost(now)
        return steps * (begun * (_cost(rows) / rows - 1) - longer) > tokens

    def _foreseen(self, more: tuple[int, ...]) -> tuple[Integers, Integers, Integers]:
        """Return the steps after which requests end, the last first, and pages and rows that there are just before."""
        running = np.array([*self._running, *more], dtype=np.int64)
        running = running[self._active[running] > 0]
        if not running.size:
            nothing = np.zeros(1, dtype=np.int64)
            return nothing, nothing + sum(self._sizes(list(self._resident))), nothing
        rows, drawn = self._active[running], self._each[running]
        left = self.lengths.expected(self._lives[running], drawn) - drawn
        ends = np.unique(left)[::-1]
        longest_first = np.argsort(-left, kind="stable")
        together, page = self._together[running], self._plan.page
        each = self._own[running] - together + drawn + page - 1  # page - 1: rounded up
        tokens = np.cumsum((together + rows * each)[longest_first])
        counts = np.cumsum(rows[longest_first])
        last = np.searchsorted(-left[longest_first], -ends, side="right") - 1
        pages = (tokens[last] + counts[last] * ends) // page
        shared, until = self._shared(running, left, more)
        if shared.size:
            order = np.argsort(-until, kind="stable")
            sums = np.concatenate([[0], np.cumsum(shared[order])])
            pages = pages + sums[np.searchsorted(-until[order], -ends, side="right")]
        return ends, pages, counts[last]

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
        if self._away:
            until[list(self._resident)] = forever
        for node in nodes:
            if self._waiting[node] > joined[node]:
                until[node] = forever
            parent = self._plan.parents[node]
            until[parent] = max(until[parent], until[node])
        return self._sizes(nodes), until[nodes]


def _cost(rows: float) -> float:
    """Return what a step of so many rows that decode takes, in tokens of prompts that take as long."""
    return max(LEAST, STEP + rows)
