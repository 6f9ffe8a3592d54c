"""Which layers has each stage where all have equal devices? The least longest one, by bisection over its seconds.

`planner.stages` divides layers among unequal groups of devices; here a search asks thousands of times for equal ones,
and every rank's bytes are held.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def split(seconds: Sequence[float], sizes: Sequence[Sequence[int]], stages: int, room: int) -> list[int] | None:
    """Return the first item of every stage of the least longest stage, whose bytes fit; `None` where none does.

    Args:
        seconds: of every item.
        sizes: of every rank, bytes of every item.
        stages: none is empty.
        room: bytes of a stage of a rank.
    """
    sums = [0.0, *itertools.accumulate(seconds)]
    held = [[0, *itertools.accumulate(own)] for own in {tuple(own) for own in sizes}]
    count = len(seconds)

    def within(longest: float) -> list[int] | None:
        starts, end = [0], 0
        for stage in range(stages):
            first = end
            most = count - (stages - stage - 1)
            while end < most and (
                sums[end + 1] - sums[first] <= longest and all(own[end + 1] - own[first] <= room for own in held)
            ):
                end += 1
            if end == first:
                return None
            starts.append(end)
        return starts[:-1] if end == count else None

    times = sorted({sums[end] - sums[start] for start in range(count) for end in range(start + 1, count + 1)})
    if stages > count or within(times[-1]) is None:
        return None
    low, high = 0, len(times) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if within(times[middle]) is not None else (middle + 1, high)
    return within(times[low])
