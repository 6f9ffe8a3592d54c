"""The optimum by looking at every choice, with code that shares nothing with other searches: what they are held to."""

from __future__ import annotations

import math
import time

import numpy as np

from tersor.errors import InputError
from tersor.planner.problem import Choice, Floats, Problem
from tersor.planner.search.found import Found
from tersor.planner.search.unfit import impossible, short, together

MOST = 20_000_000
"""Choices that are looked at; some ten seconds for ten blocks."""

AT_ONCE = 1 << 16


def brute(problem: Problem, *, most: int = MOST) -> Found:
    """Return the best of all choices that keep ties and limits.

    Args:
        problem: a small one.
        most: choices; more are refused.

    Raises:
        InputError: there are more, or none fits: the line names the limit and what is missing.
    """
    start = time.perf_counter()
    keys = [f"tie {block.tie}" if block.tie else f"block {block.name}" for block in problem.blocks]
    sizes = {key: len(block.options) for key, block in zip(keys, problem.blocks, strict=True)}
    count = math.prod(sizes.values())
    if count > most:
        raise InputError(f"there are {count:,} choices, and {most:,} are the most to look at one by one")
    shape, column = tuple(sizes.values()), {key: place for place, key in enumerate(sizes)}
    names = {block.name: column[key] for block, key in zip(problem.blocks, keys, strict=True)}
    room = np.array([limit for _, limit in problem.limits], dtype=np.float64)
    best, at, least = float("inf"), -1, np.full(len(room), np.inf)
    for first in range(0, count, AT_ONCE):
        numbers = np.arange(first, min(first + AT_ONCE, count))
        options = np.unravel_index(numbers, shape)
        seconds, nbytes = np.zeros(len(numbers)), np.zeros((len(numbers), len(room)))
        for block in problem.blocks:
            own = options[names[block.name]]
            seconds += block.seconds[own]
            nbytes += block.bytes[own]
        for edge in problem.edges:
            seconds += edge.seconds[options[names[edge.source]], options[names[edge.target]]]
        possible = np.isfinite(seconds)
        least = np.minimum(least, np.where(possible[:, None], nbytes, np.inf).min(axis=0))
        seconds = np.where(possible & (nbytes <= room).all(axis=1), seconds, np.inf)
        if seconds.min() < best:
            best, at = float(seconds.min()), first + int(seconds.argmin())
    if at < 0:
        raise _unfit(problem, least)
    found = np.unravel_index(at, shape)
    choice = Choice({name: int(found[place]) for name, place in names.items()})
    seconds_of = problem.seconds(choice)
    return Found(choice, seconds_of, seconds_of, time.perf_counter() - start, "every choice", count)


def _unfit(problem: Problem, least: Floats) -> InputError:
    """Return the error of a problem without a choice that fits, of the least bytes of each limit."""
    if np.isinf(least).any() or not len(least):
        return impossible()
    for taken, (name, limit) in zip(least.tolist(), problem.limits, strict=True):
        if taken > limit:
            return short(name, taken, limit)
    return together(", ".join(name for name, _ in problem.limits))
