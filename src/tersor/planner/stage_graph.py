"""Stages of a graph that is no chain (encoders beside a decoder, towers): balanced ones that send the fewest bytes.

The programme of Rhino (arXiv 2302.08141): nothing is read from a later stage, no stage takes longer than the mean by
more than a given part, and the bytes sent between stages are least; a result is sent once to each later stage that
reads it. Windows come first: what a part needs before it and what needs it after it fill so many stages that it can be
in a few only. Solved by HiGHS through scipy (the extra `plan`); chains have `stages`, which needs neither.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.errors import InputError
from tersor.planner.problem import Floats
from tersor.planner.search.full import check_scipy
from tersor.planner.search.unfit import shown

UNBALANCE = 0.08
"""Rhino's: by what part of the mean a stage may take longer."""

ROUNDING = 1e-9
"""Of a stage's time or room."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a graph that stays in one stage.

    Attributes:
        name: unique in the graph.
        seconds: it takes.
        bytes: it takes on a device.
        handed: bytes of its result.
        reads: names of the parts before it whose results it reads.
    """

    name: str
    seconds: float
    bytes: float = 0.0
    handed: float = 0.0
    reads: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Staged:
    """A stage for each part.

    Attributes:
        stage: by the part's name.
        sent: bytes between stages.
        slowest: seconds of the slowest stage.
        bound: no stages within the same limits send less.
        searched: seconds that the search took.
        variables: of the programme, after windows.
    """

    stage: Mapping[str, int]
    sent: float
    slowest: float
    bound: float
    searched: float
    variables: int


def stage_graph(
    parts: Sequence[Part],
    stages: int,
    *,
    unbalance: float | None = UNBALANCE,
    room: float = math.inf,
    seconds: float = 60.0,
) -> Staged:
    """Return stages that send the fewest bytes.

    Args:
        parts: in an order in which each reads only what is before it.
        stages: how many.
        unbalance: by what part of the mean a stage may take longer; None takes the least that is possible.
        room: bytes that the devices of a stage have.
        seconds: after so many the best stages so far are returned.

    Raises:
        InputError: no stages are so balanced and hold all parts: the line says what would be possible.
        UnsupportedError: scipy is not installed.
    """
    check_scipy()
    begin = time.perf_counter()
    mean = sum(part.seconds for part in parts) / stages
    least = None
    if unbalance is None:
        least = _fastest(parts, stages, room, seconds)
        allowed = least
    else:
        allowed = mean * (1 + unbalance)
    programme = _Programme(parts, stages, allowed * (1 + ROUNDING), room)
    done = programme.solve(max(seconds - (time.perf_counter() - begin), 0.1)) if programme.possible else None
    if done is None:
        least = _fastest(parts, stages, room, seconds) if least is None else least
        raise InputError(
            f"no {stages} stages keep within {allowed:.4g} s each, {unbalance or 0:.0%} above the mean: the slowest "
            f"takes at least {least:.4g} s, {least / mean - 1:.0%} above it"
        )
    placed, bound = done
    return Staged(
        {part.name: place for part, place in zip(parts, placed, strict=True)},
        sent(parts, placed),
        max(_loads(parts, placed, stages)),
        bound,
        time.perf_counter() - begin,
        programme.variables,
    )


def sent(parts: Sequence[Part], placed: Sequence[int]) -> float:
    """Return the bytes that go between stages: a result once to each later stage that reads it."""
    place = {part.name: stage for part, stage in zip(parts, placed, strict=True)}
    size = {part.name: part.handed for part in parts}
    goes = {(source, place[part.name]) for part in parts for source in part.reads if place[part.name] != place[source]}
    return sum(size[source] for source, _ in goes)


def windows(parts: Sequence[Part], stages: int, allowed: float) -> list[tuple[int, int]]:
    """Return the first and last stage that each part can be in, if no stage takes longer than is allowed."""
    number = {part.name: place for place, part in enumerate(parts)}
    count = len(parts)
    before = np.zeros((count, count), dtype=bool)  # [part, what it needs, itself among it]
    for place, part in enumerate(parts):
        before[place, place] = True
        for source in part.reads:
            assert number[source] < place, f"{source} is not ahead of {part.name}"
            before[place] |= before[number[source]]
    took = np.array([part.seconds for part in parts])

    def filled(needed: Floats) -> Any:
        return np.maximum(np.ceil(needed / allowed - ROUNDING), 1).astype(int)

    first, last = filled(before @ took) - 1, stages - filled(before.T @ took)
    return list(zip(first.tolist(), last.tolist(), strict=True))


def _loads(parts: Sequence[Part], placed: Sequence[int], stages: int) -> list[float]:
    """Return the seconds of every stage."""
    return [
        sum(part.seconds for part, own in zip(parts, placed, strict=True) if own == stage) for stage in range(stages)
    ]


def _fastest(parts: Sequence[Part], stages: int, room: float, seconds: float) -> float:
    """Return the least that the slowest stage can take."""
    total = sum(part.seconds for part in parts)
    programme = _Programme(parts, stages, total * (1 + ROUNDING), room, balance=True)
    done = programme.solve(seconds)
    if done is None:
        needed = sum(part.bytes for part in parts)
        largest = max(parts, key=lambda part: part.bytes)
        raise InputError(
            f"no {stages} stages of {shown(room)} hold all parts, which take {shown(needed)}, {largest.name} alone "
            f"{shown(largest.bytes)}"
        )
    return max(_loads(parts, done[0], stages))


class _Programme:
    """Variables: of each part and stage, whether it is there or earlier; of each result and stage, whether it is sent.

    Attributes:
        possible: whether windows leave every part a stage.
        variables: that are open.
    """

    def __init__(self, parts: Sequence[Part], stages: int, allowed: float, room: float, balance: bool = False) -> None:
        self._parts, self._stages, self._allowed, self._room, self._balance = parts, stages, allowed, room, balance
        self._number = {part.name: place for place, part in enumerate(parts)}
        self._windows = windows(parts, stages, allowed)
        self.possible = all(first <= last for first, last in self._windows)
        self._count = len(parts)
        read = sorted({self._number[source] for part in parts for source in part.reads})
        self._sends = {
            pair: place for place, pair in enumerate((one, stage) for one in read for stage in range(1, stages))
        }
        self._rows: list[dict[int, float]] = []
        self._least: list[float] = []
        self._most: list[float] = []
        self.variables = sum(last - first for first, last in self._windows) + len(self._sends) + balance

    def solve(self, seconds: float) -> tuple[list[int], float] | None:
        """Return the stage of every part and the bound on bytes, or None if nothing is possible."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix

        stages, there = self._stages, self._count * self._stages
        count = there + len(self._sends) + 1  # the last one is the slowest stage's time
        lower, upper = np.zeros(count), np.ones(count)
        upper[-1] = np.inf if self._balance else 0.0
        for part, (first, last) in enumerate(self._windows):
            upper[part * stages : part * stages + first] = 0.0
            lower[part * stages + last : (part + 1) * stages] = 1.0
        self._fill()
        rows = [(row, column, value) for row, line in enumerate(self._rows) for column, value in line.items()]
        matrix = csr_matrix(
            ([value for *_, value in rows], ([row for row, *_ in rows], [column for _, column, _ in rows])),
            (len(self._rows), count),
        )
        costs, unit = np.zeros(count), 1.0
        if self._balance:
            costs[-1], unit = 1000.0, self._allowed
        else:
            unit = max((part.handed for part in self._parts), default=0.0) or 1.0
            for (part, _), place in self._sends.items():
                costs[there + place] = 1000.0 * self._parts[part].handed / unit
        whole = np.zeros(count, dtype=np.int64)
        whole[:there] = 1
        done = milp(
            costs,
            integrality=whole,
            bounds=Bounds(lower, upper),
            constraints=LinearConstraint(matrix, self._least, self._most),
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )
        if done.status == 2:
            return None
        if done.x is None:
            raise InputError(f"no stages were found in {seconds:g} s: give the search more")
        early = np.rint(done.x[:there]).reshape(self._count, stages)
        return (early == 0).sum(axis=1).astype(int).tolist(), float(done.mip_dual_bound) * unit / 1000.0

    def _row(self, line: dict[int, float], least: float, most: float) -> None:
        self._rows.append(line)
        self._least.append(least)
        self._most.append(most)

    def _in(self, part: int, stage: int, factor: float = 1.0) -> dict[int, float]:
        """Return whether a part is in a stage, as a sum of variables."""
        line = {part * self._stages + stage: factor}
        if stage:
            line[part * self._stages + stage - 1] = -factor
        return line

    def _fill(self) -> None:
        """Make the rows: order, time and room of every stage, and what is sent."""
        stages, there = self._stages, self._count * self._stages
        for part in range(self._count):
            for stage in range(1, stages):
                self._row(self._in(part, stage), 0.0, 1.0)
            for source in {self._number[name] for name in self._parts[part].reads}:
                for stage in range(stages - 1):
                    self._row({source * stages + stage: 1.0, part * stages + stage: -1.0}, 0.0, 1.0)
                for stage in range(1, stages):
                    line = {there + self._sends[source, stage]: 1.0, **self._in(source, stage)}
                    self._row({**line, **self._in(part, stage, -1.0)}, 0.0, np.inf)
        for stage in range(stages):
            self._stage_row(stage, [part.seconds for part in self._parts], self._allowed)
            self._stage_row(stage, [part.bytes for part in self._parts], self._room)
            if self._balance:
                slowest = {there + len(self._sends): -1.0}
                for part, own in enumerate(self._parts):
                    slowest |= self._in(part, stage, own.seconds / self._allowed)
                self._row(slowest, -np.inf, 0.0)

    def _stage_row(self, stage: int, sizes: Sequence[float], most: float) -> None:
        """What the parts of a stage add up to is at most this."""
        if math.isinf(most):
            return
        line: dict[int, float] = {}
        for part, size in enumerate(sizes):
            line |= self._in(part, stage, size / most)
        self._row(line, -np.inf, 1.0)
