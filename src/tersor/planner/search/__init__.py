"""Which options are the fastest that fit? Searches over one problem, from proven to drawn at random.

`fast` is exact where equal layers are tied, in time that grows with the kinds of layers; `near` lets them choose for
themselves where that is worth more than a hundredth. `full` solves the integer programme of any problem, with a bound
(scipy, the extra `plan`); `untied` gives it problems in which every layer chooses for itself. `learned` (Auto-MAP) and
`random` are what others did and what is least; `brute` looks at everything and is what tests hold the others to.
"""

from __future__ import annotations

from tersor.planner.problem import Problem
from tersor.planner.search.brute import brute
from tersor.planner.search.drawn import random
from tersor.planner.search.fast import fast, near
from tersor.planner.search.fold import untied
from tersor.planner.search.found import Found
from tersor.planner.search.full import check_scipy, full

__all__ = ["Found", "brute", "check_scipy", "fast", "full", "learned", "near", "random", "untied"]


def learned(problem: Problem, *, seed: int = 0, episodes: int = 400) -> Found:
    """Return the best plan that a network met while it learnt to make plans; see `dqn.learned`."""
    from tersor.planner.search import dqn

    return dqn.learned(problem, seed=seed, episodes=episodes)
