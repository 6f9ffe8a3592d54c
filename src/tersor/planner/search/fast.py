"""The optimum of a problem whose equal layers are tied, in time that grows with the kinds of layers.

Ties are folded, what can be decided before is decided, and elimination finds the least sum. Where that exceeds a limit
of memory, bytes get a price; from the best price what it leaves open is looked through. So the answer is the optimum,
or, where that would take too long, comes with a bound.
"""

from __future__ import annotations

import time

from tersor.planner.problem import Problem
from tersor.planner.search.branches import look_through, repaired
from tersor.planner.search.elimination import Elimination
from tersor.planner.search.fold import fold
from tersor.planner.search.found import Found
from tersor.planner.search.presolve import presolve
from tersor.planner.search.prices import Pricing
from tersor.planner.search.unfit import UnfitError, reason

BRANCHES = 30_000
"""Beginnings of plans that are looked at, of a problem whose limits bind: about a second."""


def fast(problem: Problem, *, branches: int = BRANCHES) -> Found:
    """Return the optimum, or the best plan found with a bound.

    Args:
        problem: with or without ties (`fold.untied`), of any graph.
        branches: how much is looked through where limits bind.

    Raises:
        InputError: no choice fits: the line names the limit and what is missing; or the graph is too wide.
    """
    start = time.perf_counter()
    try:
        graph = presolve(fold(problem))
        elimination = Elimination(graph.sizes, graph.edges)
        pricing = Pricing(graph, elimination)
        leasts = [pricing.least(limit) for limit in range(len(graph.limits))]
        priced = pricing.best(leasts)
        best, bound, steps, method = priced.plans[0], priced.bound, priced.entries, "elimination"
        if len(priced.plans) > 1:
            looked = look_through(graph, elimination, priced, leasts, repaired(graph, priced.plans), branches)
            best, bound, steps = looked.plan, looked.bound, steps + looked.branches
            method = "elimination, memory by price"
    except UnfitError:
        raise reason(problem) from None
    choice = graph.choice(best)
    seconds = problem.seconds(choice)
    # The same sum in another order: what it proves is true up to rounding.
    bound = seconds if bound >= seconds * (1 - 1e-12) else bound
    return Found(choice, seconds, bound, time.perf_counter() - start, method, steps)
