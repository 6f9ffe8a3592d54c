"""The best of plans that are drawn at random: what a search that learns or reckons has to beat."""

from __future__ import annotations

import time

import numpy as np

from tersor.errors import InputError
from tersor.planner.problem import Problem
from tersor.planner.search.domains import Domains
from tersor.planner.search.fast import fast
from tersor.planner.search.fold import fold
from tersor.planner.search.found import Found
from tersor.planner.search.presolve import presolve
from tersor.planner.search.unfit import UnfitError, reason


def random(problem: Problem, *, seed: int = 0, count: int = 1000) -> Found:
    """Return the best of plans drawn uniformly, option by option, among those that are open.

    Args:
        problem: ties are kept.
        seed: of the draws.
        count: plans to draw.

    Raises:
        InputError: no choice fits, or none of those drawn.
    """
    start = time.perf_counter()
    try:
        graph = presolve(fold(problem))
        domains = Domains(graph)
    except UnfitError:
        raise reason(problem) from None
    numbers = np.random.default_rng(seed)
    plans = []
    for _ in range(count):
        domains.restart()
        plan = np.zeros(len(graph.seconds), dtype=np.int64)
        for node in range(len(plan)):
            plan[node] = numbers.choice(np.flatnonzero(domains.open[node]))
            if not domains.decide(node, int(plan[node])):
                break
        else:
            plans.append(plan)
    if not plans:
        fast(problem)  # says so where nothing fits
        raise InputError(f"none of {count:,} plans drawn at random fits: draw more, or search another way")
    seconds, _ = graph.evaluate(np.array(plans))
    choice = graph.choice(plans[int(seconds.argmin())])
    took = time.perf_counter() - start
    return Found(choice, problem.seconds(choice), float("-inf"), took, f"best of {len(plans):,} at random", count)
