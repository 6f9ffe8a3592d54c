"""What a byte of each limit costs where memory is short: the best bound that prices give, and plans on the way.

With a price a byte, limits leave the problem and elimination solves it; whatever the prices, no plan that fits takes
less than that sum minus the price of all limits (Lagrangian relaxation). One limit: prices are cut between the cheapest
plan known that fits and the cheapest that does not, until no plan lies between, which is the best price there is.
Several: steps along what each limit is exceeded by (subgradients, with Polyak's length).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tersor.planner.problem import Floats
from tersor.planner.search.elimination import Elimination, Tables
from tersor.planner.search.fold import Graph, Options
from tersor.planner.search.unfit import UnfitError

CUTS = 60
"""Prices of one limit that are tried at most; a dozen is usual."""

STEPS, PATIENCE, GAIN = 300, 50, 1e-5
"""Prices of several limits that are tried: so many, or until as many steps as the second raise the bound by less than
the third of it."""

EQUAL = 1e-12
"""Of a sum, what counts as rounding."""


@dataclass(slots=True)
class Priced:
    """Prices, what they prove, and plans that were met.

    Attributes:
        prices: seconds a byte of each limit.
        tables: of the elimination at these prices.
        bound: no plan that fits takes less.
        plans: options of nodes, each met once.
        entries: of tables computed.
    """

    prices: Floats
    tables: Tables
    bound: float
    plans: list[Options] = field(default_factory=list)
    entries: int = 0


class Pricing:
    """A graph whose limits are prices."""

    def __init__(self, graph: Graph, elimination: Elimination) -> None:
        self._graph, self._elimination = graph, elimination
        self._room = graph.room
        self.entries = 0

    def least(self, limit: int) -> Tables:
        """Return the tables of the least bytes that possible plans take of a limit.

        Raises:
            UnfitError: that is more than the limit.
        """
        tables = self._elimination.solve([taken[:, limit] for taken in self._graph.bytes], with_edges=False)
        self.entries += self._elimination.entries
        if tables.least > self._room[limit]:
            raise UnfitError
        return tables

    def at(self, prices: Floats) -> tuple[Tables, float, Options, float, Floats]:
        """Return tables, bound, plan, its seconds, and [limits] by what it exceeds each, at these prices."""
        each = zip(self._graph.seconds, self._graph.bytes, strict=True)
        tables = self._elimination.solve([seconds + taken @ prices for seconds, taken in each])
        self.entries += self._elimination.entries
        plan = self._elimination.best(tables)
        seconds, taken = self._graph.evaluate(plan[None])
        return tables, tables.least - float(prices @ self._room), plan, float(seconds[0]), taken[0] - self._room

    def best(self, leasts: list[Tables]) -> Priced:
        """Return the best prices found.

        Args:
            leasts: of each limit, the tables of its least bytes.

        Raises:
            UnfitError: no plan is possible, whatever it takes.
        """
        tables, bound, plan, seconds, over = self.at(np.zeros(len(self._room)))
        if np.isinf(bound):
            raise UnfitError
        found = Priced(np.zeros(len(self._room)), tables, bound, [plan])
        if (over > 0).any():
            small = [self._elimination.best(tables) for tables in leasts]
            found.plans += small
            if len(self._room) == 1:
                self._cut(found, (seconds, float(over[0])), small[0])
            else:
                self._walk(found, over)
        found.entries = self.entries
        return found

    def _cut(self, found: Priced, cheap: tuple[float, float], small: Options) -> None:
        """Find the price of the only limit, between a plan that exceeds it and one that fits."""
        seconds, taken = self._graph.evaluate(small[None])
        fits = (float(seconds[0]), float(taken[0, 0] - self._room[0]))
        for _ in range(CUTS):
            if cheap[1] <= fits[1]:
                return
            price = (fits[0] - cheap[0]) / (cheap[1] - fits[1])
            if price < 0:  # the plan of least bytes is the faster one, too
                return
            tables, bound, plan, own, over = self.at(np.array([price]))
            if bound > found.bound:
                found.prices, found.tables, found.bound = np.array([price]), tables, bound
            found.plans.append(plan)
            line = fits[0] + price * fits[1]
            if own + price * float(over[0]) >= line - EQUAL * abs(line):
                return
            if over[0] > 0:
                cheap = (own, float(over[0]))
            else:
                fits = (own, float(over[0]))

    def _walk(self, found: Priced, over: Floats) -> None:
        """Find prices of several limits; what a limit is exceeded by is counted in parts of it."""
        scale = np.maximum(np.abs(self._room), 1.0)
        prices = np.zeros(len(scale))
        known = float("inf")  # the least seconds of a plan that fits
        length, idle, before = 1.0, 0, found.bound
        for step in range(1, STEPS + 1):
            toward = over / scale
            toward[(prices <= 0) & (toward < 0)] = 0.0
            norm = float(toward @ toward)
            if not norm:
                return
            aim = known if np.isfinite(known) else found.bound + 0.05 * abs(found.bound)
            if aim - found.bound <= EQUAL * abs(aim):
                return
            prices = np.maximum(prices + length * max(aim - found.bound, 0.0) / norm * toward, 0.0)
            tables, bound, plan, seconds, over = self.at(prices / scale)
            found.plans.append(plan)
            if (over <= 0).all():
                known = min(known, seconds)
            if bound > found.bound:
                found.prices, found.tables, found.bound, idle = prices / scale, tables, bound, 0
            else:
                idle += 1
                if idle == 5:
                    length, idle = length / 2, 0
                    prices = found.prices * scale
            if step % PATIENCE == 0:
                if found.bound - before <= GAIN * abs(found.bound):
                    return
                before = found.bound
