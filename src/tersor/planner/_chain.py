"""The least time of a problem by eliminating one block after the other, exactly; where memory binds, a price a byte."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.errors import InputError
from tersor.planner.problem import Choice, Problem

_STEPS = 40


@dataclass(frozen=True)
class Found:
    """What a search found: the choice, its seconds, a bound below the least, seconds of the search and its name."""

    choice: Choice
    seconds: float
    bound: float
    searched: float
    method: str

    @property
    def gap(self) -> float:
        """By how much of its time the choice may be worse than the best one."""
        return 0.0 if self.seconds <= self.bound else (self.seconds - self.bound) / self.seconds


def fast(problem: Problem) -> Found:
    """Return the best choice; where memory binds, the best of those that a price on bytes finds."""
    began, free = time.perf_counter(), _eliminated(problem, 0.0)
    bound, best = problem.seconds(free), free if problem.fits(free) else None
    low, high = 0.0, 1e-15
    for _ in range(_STEPS * (best is None)):
        choice = _eliminated(problem, high if best is None else (low + high) / 2)
        bytes_over = sum(
            float(used - limit) for used, (_, limit) in zip(problem.bytes(choice), problem.limits, strict=True)
        )
        price = high if best is None else (low + high) / 2
        bound = max(bound, problem.seconds(choice) + price * bytes_over)
        if problem.fits(choice):
            best = choice if best is None or problem.seconds(choice) < problem.seconds(best) else best
            high = price
        else:
            low, high = price, high * 16 if best is None else high
    if best is None:
        names = [
            f"{name} takes {used:.0f} of {limit:.0f}"
            for used, (name, limit) in zip(problem.bytes(choice), problem.limits, strict=True)
        ]
        raise InputError(f"no choice fits in memory: {', '.join(names)} bytes")
    return Found(
        best, problem.seconds(best), min(bound, problem.seconds(best)), time.perf_counter() - began, "elimination"
    )


def _eliminated(problem: Problem, price: float) -> Choice:
    sizes = {block.name: len(block.options) for block in problem.blocks}
    tables: list[tuple[tuple[str, ...], Any]] = [
        ((block.name,), block.seconds + price * block.bytes.sum(1)) for block in problem.blocks
    ]
    tables += [((edge.source, edge.target), edge.seconds) for edge in problem.edges]
    steps = []
    for name in sizes:
        own, tables = [t for t in tables if name in t[0]], [t for t in tables if name not in t[0]]
        others = tuple(dict.fromkeys(other for names, _ in own for other in names if other != name))
        joint = np.full([sizes[other] for other in others] + [sizes[name]], 0.0)
        for names, values in own:
            order = [(*others, name).index(one) for one in names]
            shape = [1] * joint.ndim
            for place, size in zip(order, values.shape, strict=True):
                shape[place] = size
            joint += np.transpose(values, np.argsort(order)).reshape(shape)
        steps.append((name, others, joint.argmin(-1)))
        tables.append((others, joint.min(-1)))
    choice: dict[str, int] = {}
    for name, others, best in reversed(steps):
        choice[name] = int(best[tuple(choice[other] for other in others)])
    return Choice(choice)


def split(seconds: list[float], sizes: list[list[int]], stages: int, room: int) -> list[int] | None:
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
