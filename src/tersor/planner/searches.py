"""Which search of `planner.search` is meant by a name? Each takes a problem and returns what it found."""

from __future__ import annotations

from collections.abc import Callable

from tersor.errors import InputError, did_you_mean
from tersor.planner import search
from tersor.planner.problem import Problem
from tersor.planner.search import Found

Solve = Callable[[Problem], Found]
"""A search."""
DRAWN = 200
"""Plans of one way to deal out GPUs that are drawn at random."""


def random(problem: Problem) -> Found:
    """Return the best of some plans drawn at random."""
    return search.random(problem, seed=0, count=DRAWN)


def learned(problem: Problem) -> Found:
    """Return the best plan that a network met."""
    return search.learned(problem, seed=0)


def full(problem: Problem) -> Found:
    """Return the optimum with the certificate of an integer programme.

    Raises:
        UnsupportedError: scipy is not installed.
    """
    search.check_scipy()
    return search.full(problem)


SEARCHES: dict[str, Solve] = {"fast": search.fast, "full": full, "random": random, "dqn": learned}
"""Name -> search."""
SLOW = ("dqn",)
"""Searches that are asked for cuts alone: how GPUs are dealt out, `fast` finds ahead of them."""
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
