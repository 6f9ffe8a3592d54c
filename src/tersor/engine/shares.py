"""Which worker runs which part of a plan? Whole prefix groups, the longest first, one split only where that pays."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import numpy as np

from tersor.engine.groups import Plan
from tersor.engine.prefix_tree import Integers
from tersor.errors import InputError

_SPLITS, _EVEN = 4, 0.01
"""Groups split at most for each worker, and the part of a mean share by which shares may differ."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker runs.

    Attributes:
        ranges: (start, stop) of positions of the plan that belong together, the longest of them first.
        cost: their tokens: computed of prompts, and drawn, weighted.
    """

    ranges: list[tuple[int, int]]
    cost: float

    @property
    def positions(self) -> Integers:
        """All positions, in the order of the ranges."""
        return np.concatenate([np.arange(0), *(np.arange(*part) for part in self.ranges)])


def share_out(plan: Plan, workers: int, *, token_cost: float = 1.0) -> list[Share]:
    """Share a plan out over workers of equal speed.

    Groups go to the worker that has least so far, the longest group first (Graham 1969: at most 4/3 of the best). Then
    a part of a group moves from the worker that has most to the one that has least, as long as that shortens the
    longest share, the prefix that is computed twice for it is less than the difference of the two, and that matters.

    Args:
        plan: of the requests.
        workers: how many.
        token_cost: what a token drawn costs, in prompt tokens.

    Returns:
        A share a worker, the largest first; one is empty where there are more workers than work.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}: it must be at least 1")
    count = plan.order.size
    costs = plan.lengths - plan.reused + token_cost * plan.outputs
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    edges = [*np.flatnonzero(plan.reused == 0).tolist(), count]
    groups = [(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]
    groups.sort(key=lambda group: sums[group[0]] - sums[group[1]])
    loads = [(0.0, worker) for worker in range(workers)]
    parts: list[list[tuple[int, int]]] = [[] for _ in range(workers)]
    for start, stop in groups:
        load, worker = heapq.heappop(loads)
        parts[worker].append((start, stop))
        heapq.heappush(loads, (load + float(sums[stop] - sums[start]), worker))
    totals = [0.0] * workers
    for load, worker in loads:
        totals[worker] = load
    for _ in range(_SPLITS * workers):
        if not _split(plan, sums, parts, totals):
            break
    shares = [Share(_longest_first(part, sums), total) for part, total in zip(parts, totals, strict=True)]
    return sorted(shares, key=lambda share: -share.cost)


def _longest_first(part: list[tuple[int, int]], sums: np.ndarray) -> list[tuple[int, int]]:
    return sorted(part, key=lambda group: sums[group[0]] - sums[group[1]])


def _split(plan: Plan, sums: np.ndarray, parts: list[list[tuple[int, int]]], totals: list[float]) -> bool:
    """Move the end of one group from the longest share to the shortest; return whether any is worth it."""
    most, least = int(np.argmax(totals)), int(np.argmin(totals))
    difference = totals[most] - totals[least]
    if difference <= _EVEN * sum(totals) / len(totals):
        return False
    best, choice = totals[most], (0, 0, 0)
    for index, (start, stop) in enumerate(parts[most]):
        if stop - start == 1:
            continue
        cuts = np.arange(start + 1, stop)
        moved = sums[stop] - sums[cuts]
        twice = plan.reused[cuts]
        longest = np.where(
            twice < difference, np.maximum(totals[most] - moved, totals[least] + moved + twice), totals[most]
        )
        if longest.min() < best:
            best, choice = float(longest.min()), (index, int(cuts[longest.argmin()]), stop)
    index, cut, stop = choice
    if not cut:
        return False
    moved = float(sums[stop] - sums[cut])
    start = parts[most][index][0]
    parts[most][index] = (start, cut)
    parts[least].append((cut, stop))
    totals[most] -= moved
    totals[least] += moved + int(plan.reused[cut])
    return True
