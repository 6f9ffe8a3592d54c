"""Which search is meant by a name? Each takes a problem and returns what it found."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from tersor.errors import InputError, did_you_mean
from tersor.planner._chain import Found, fast, split
from tersor.planner.problem import Choice, Problem

__all__ = ["NAMES", "SEARCHES", "Found", "Solve", "fast", "random", "search_named", "split"]

Solve = Callable[[Problem], Found]
"""A search."""

_SEED, _COUNT = 0, 200


def random(problem: Problem, *, seed: int = _SEED, count: int = _COUNT) -> Found:
    """Return the best of so many choices that are drawn block by block among what the blocks before allow.

    Raises:
        InputError: none of them fits.
    """
    began, generator = time.perf_counter(), np.random.default_rng(seed)
    best: Choice | None = None
    for _ in range(count):
        choice: dict[str, int] = {}
        for block in problem.blocks:
            allowed = np.isfinite(block.seconds)
            for edge in problem.edges:
                if edge.target == block.name and edge.source in choice:
                    allowed &= np.isfinite(edge.seconds[choice[edge.source]])
            options = np.flatnonzero(allowed)
            choice[block.name] = int(generator.choice(options)) if options.size else 0
        found = Choice(choice)
        if problem.fits(found) and np.isfinite(problem.seconds(found)):
            best = found if best is None or problem.seconds(found) < problem.seconds(best) else best
    if best is None:
        raise InputError(f"none of {count} random choices fits")
    return Found(best, problem.seconds(best), 0.0, time.perf_counter() - began, f"best of {count} random choices")


SEARCHES: dict[str, Solve] = {"fast": fast, "random": random}
"""Name -> search."""
NAMES = (*SEARCHES, "rules")
"""What `--search` takes; `rules` searches nothing."""


def search_named(name: str) -> Solve:
    """Return the search of a name.

    Raises:
        InputError: there is none.
    """
    if name not in SEARCHES:
        raise InputError(f"no search {name!r}{did_you_mean(name, NAMES)}: use one of {', '.join(NAMES)}")
    return SEARCHES[name]
