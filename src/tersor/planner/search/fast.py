"""The optimum of a problem whose equal layers are tied, in time that grows with the kinds of layers; and without ties.

Ties are folded, what can be decided before is decided, and elimination finds the least sum. Where that exceeds a limit
of memory, bytes get a price; from the best price what it leaves open is looked through. So the answer is the optimum,
or, where that would take too long, comes with a bound.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace

from tersor.errors import InputError
from tersor.planner.problem import Problem
from tersor.planner.search.branches import look_through, repaired
from tersor.planner.search.elimination import Elimination
from tersor.planner.search.fold import fold, untied
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


def near(problem: Problem, *, part: float = 0.01, keep: Collection[str] = (), branches: int = BRANCHES) -> Found:
    """Return the tied optimum where it is near that of layers which choose for themselves, else a choice of theirs.

    Equal layers lose little by choosing alike until memory is short: then some should take less than others.

    Args:
        problem: with ties.
        part: by what part of its time the tied optimum may be improved without ties, at most.
        keep: names of ties that stay whatever the layers choose, such as that of shared weights.
        branches: as of `fast`.

    Returns:
        With the bound of the problem without ties; a choice that breaks ties fits `untied(problem, keep)`.

    Raises:
        InputError: no choice fits, with ties and without; or the graph is too wide.
    """
    start = time.perf_counter()
    free = fast(untied(problem, keep), branches=branches)
    try:
        tied = fast(problem, branches=branches)
    except InputError:  # equal layers that choose alike do not fit
        return replace(free, method=f"{free.method}, untied")
    steps = free.steps + tied.steps
    if tied.seconds <= free.bound * (1 + part):
        best = replace(tied, bound=min(free.bound, tied.seconds), method=f"{tied.method}, tied")
    else:
        best = replace(free, method=f"{free.method}, untied")
    return replace(best, searched=time.perf_counter() - start, steps=steps)
