"""Why does no choice fit? The least that is needed of each limit, of the problem as it was given."""

from __future__ import annotations

import numpy as np

from tersor.errors import InputError
from tersor.planner.problem import Problem
from tersor.planner.search.elimination import Elimination
from tersor.planner.search.fold import fold


class UnfitError(Exception):
    """Nothing fits, as some step of a search has seen; `reason` says why."""


def shown(nbytes: float) -> str:
    """Return bytes as they stand in a message."""
    return f"{nbytes / 1e9:.2f} GB" if abs(nbytes) >= 1e7 else f"{nbytes:,.0f} bytes"


def short(name: str, least: float, limit: float) -> InputError:
    """Return the error of a limit that no choice keeps: what is missing."""
    return InputError(
        f"{name}: whatever is chosen, {shown(least)} are needed of {shown(limit)}, {shown(least - limit)} are missing"
    )


def impossible() -> InputError:
    """Return the error of a problem in which no options go together, whatever the limits."""
    return InputError("no option of a block is possible beside some option of every other block")


def together(names: str) -> InputError:
    """Return the error of limits, in words, that no choice keeps at once."""
    return InputError(f"no choice keeps all of these limits at once, though it can keep each: {names}")


def reason(problem: Problem) -> InputError:
    """Return the error of a problem of which it is known that nothing fits."""
    for block in problem.blocks:
        if not np.isfinite(block.seconds).any():
            return InputError(f"{block.name}: none of its options is possible: {', '.join(block.options)}")
    graph = fold(problem)
    elimination = Elimination(graph.sizes, graph.edges)
    if elimination.too_wide:
        for limit, (name, room) in enumerate(graph.limits):
            least = sum(float(taken[:, limit].min()) for taken in graph.bytes)
            if least > room:
                return short(name, least, room)
        return InputError("no options that are possible beside each other keep all limits")
    possible = [np.where(np.isfinite(seconds), 0.0, np.inf) for seconds in graph.seconds]
    if np.isinf(elimination.solve(possible, with_edges=False).least):
        return impossible()
    for limit, (name, room) in enumerate(graph.limits):
        costs = [none + taken[:, limit] for none, taken in zip(possible, graph.bytes, strict=True)]
        least = elimination.solve(costs, with_edges=False).least
        if least > room:
            return short(name, least, room)
    return together(", ".join(name for name, _ in graph.limits))
