"""Where is a chain of layers cut into pipeline stages, and which devices take which? The optimum, by dynamic programme.

Layers may take different times, the ends (embedding, head) among them; devices are taken from pools, in groups of any
size, and a stage of more devices or of other ones takes other times. Every stage pays for what it receives, too.

Which optimum: one request passes through all stages, so it takes their sum; many in a row finish one after each
slowest stage. With m requests in a row all take the sum and m - 1 times the slowest stage (the objective of Alpa, arXiv
2201.12023, section 5; Alpa goes through all times that the slowest stage may have, here only those that are the least
for some sum are met). Graphs that are no chain: `stage_graph`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tersor.errors import InputError
from tersor.planner.problem import Floats
from tersor.planner.search.unfit import shown

MOST = 4_000_000_000
"""Cuts that are compared: some ten seconds."""

EQUAL = 1e-12
"""Of a time, what counts as rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """A kind of stage: devices that compute it, and what each layer takes there.

    Attributes:
        name: such as "4 of node 0".
        devices: [pools], how many it takes of each pool.
        seconds: [layers], infinity where it cannot run a layer.
        bytes: [layers] on each device, or [devices, layers] where some hold other parts than others.
        room: bytes that a device has.
        fixed: bytes that a stage takes there whatever its layers.
    """

    name: str
    devices: tuple[int, ...]
    seconds: Floats
    bytes: Floats
    room: float = math.inf
    fixed: float = 0.0


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers from `first` to before `end`, on a group.

    Attributes:
        group: place among the groups.
        first, end: layers.
        seconds: that the stage takes, with what it receives.
        bytes: on the device that holds most.
    """

    group: int
    first: int
    end: int
    seconds: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Split:
    """Stages in order.

    Attributes:
        stages: from the first layer to the last.
        slowest: seconds of the slowest stage: what a pipeline that is full takes for each request.
        total: seconds of all stages: what one request takes.
        cuts: ways to divide that were compared, or plans of a branching search.
    """

    stages: tuple[Stage, ...]
    slowest: float
    total: float
    cuts: int

    def seconds(self, requests: float) -> float:
        """What so many requests in a row take; of infinitely many, one at the end."""
        return self.slowest if math.isinf(requests) else self.total + (requests - 1) * self.slowest


def split(
    groups: Sequence[Group],
    pools: Sequence[int],
    handed: Floats,
    *,
    requests: float = math.inf,
    idle: bool = True,
) -> Split:
    """Return the stages that take the least.

    Args:
        groups: kinds of stages, each to be used as often as pools allow.
        pools: devices of each pool.
        handed: [groups, groups, layers], seconds to hand the result of a layer from a group to the next stage's;
            infinity where two groups cannot follow each other.
        requests: that follow each other: 1 is the least latency, infinity the most throughput, among which the least
            latency is taken.
        idle: whether devices may be left idle.

    Raises:
        InputError: no devices hold the layers: the line says what is missing; or there are too many kinds of groups.
    """
    programme = _Programme(groups, pools, handed, idle)
    floor = programme.slowest()
    best = programme.least(floor if math.isinf(requests) else math.inf)
    if best is None:
        raise programme.unfit()
    if math.isinf(requests):
        return best
    other = best
    while requests > 1:
        # What a smaller slowest stage could still give: not below `floor`, and not with a smaller sum.
        if other.total + (requests - 1) * floor >= best.seconds(requests) * (1 - EQUAL):
            break
        faster = programme.least(other.slowest, strictly=True)
        if faster is None:
            break
        other = faster
        if other.seconds(requests) < best.seconds(requests):
            best = other
    return best


_State: TypeAlias = tuple[tuple[int, ...], int]
"""Devices taken of each pool, and the last stage's group, or -1 at the start."""


class _Programme:
    """The dynamic programme over devices taken, the last stage's group, and layers done."""

    def __init__(self, groups: Sequence[Group], pools: Sequence[int], handed: Floats, idle: bool) -> None:
        layers = len(groups[0].seconds)
        most = np.max([group.devices for group in groups], axis=0) * layers  # a stage has a layer at least
        self._groups, self._idle = list(groups), idle
        self._pools = tuple(np.minimum(pools, most).tolist()) if idle else tuple(pools)
        assert handed.shape == (len(groups), len(groups), layers), f"handed is {handed.shape}"
        assert all(any(group.devices) for group in groups), "a group takes no device"
        self.layers = layers
        cuts = math.prod(size + 1 for size in self._pools) * len(groups) ** 2 * (layers + 1) ** 2
        if cuts > MOST:
            raise InputError(
                f"{len(groups)} kinds of stages from pools of {_named(self._pools)} devices are {cuts:,} cuts of "
                f"{layers} layers, and {MOST:,} are the most to compare: put equal devices into one pool, or search a "
                "replica"
            )
        rows = [handed[group].tobytes() for group in range(len(groups))]
        self._alike = [rows.index(row) for row in rows]
        """Of each group, the first one that hands on as it does: which of them was last makes no difference."""
        self._own: list[Floats] = []
        """[layers + 1, layers + 1] of each group, seconds of a stage from a layer to before another."""
        self._taken: list[Floats] = []
        for group in groups:
            seconds = _sums(group.seconds)
            taken = np.max([_sums(each) for each in np.atleast_2d(group.bytes)], axis=0) + group.fixed
            self._own.append(np.where(taken <= group.room, seconds, np.inf))
            self._taken.append(taken)
        # With what a stage receives: from a group, [first layer, end]; nothing comes before the first layer.
        self._stages: dict[tuple[int, int], Floats] = {}
        for other in range(len(groups)):
            self._stages[-1, other] = self._own[other]
            for one in range(len(groups)):
                before = np.concatenate(([np.inf], handed[one, other]))
                self._stages[one, other] = self._own[other] + before[:, None]
        self.cuts = 0

    def slowest(self) -> float:
        """Return the least that the slowest stage can take."""
        return float(self._run(np.maximum, math.inf)[0])

    def least(self, slowest: float, strictly: bool = False) -> Split | None:
        """Return the stages of the least sum, none of which is slower than this, or as slow; None if there are none."""
        allowed = slowest * (1 - EQUAL) if strictly else slowest * (1 + EQUAL)
        total, stages = self._run(np.add, allowed)
        if math.isinf(total):
            return None
        made = tuple(
            Stage(group, first, end, float(own[first, end]), float(self._taken[group][first, end]))
            for before, group, first, end in stages
            for own in [self._stages[before, group]]
        )
        return Split(made, max(stage.seconds for stage in made), sum(stage.seconds for stage in made), self.cuts)

    def _run(self, add: np.ufunc, allowed: float) -> tuple[float, list[tuple[int, int, int, int]]]:
        """Return the least sum, or slowest stage, and of its stages (group before, group, first layer, end)."""
        layers = self.layers
        shape = tuple(size + 1 for size in self._pools)
        best: dict[_State, Floats] = {}
        came: dict[_State, list[tuple[Floats, int, _State]]] = {}
        start: _State = ((0,) * len(shape), -1)
        best[start] = np.where(np.arange(layers + 1) == 0, 0.0, np.inf)
        open_stages = {key: np.where(table <= allowed, table, np.inf) for key, table in self._stages.items()}
        for counts in np.ndindex(*shape):  # fewer devices always come first
            for last in sorted({-1, *self._alike}):
                state = (counts, last)
                if state not in best or np.isinf(best[state]).all():
                    continue
                for group, kind in enumerate(self._groups):
                    after = tuple(have + need for have, need in zip(counts, kind.devices, strict=True))
                    if any(have >= size for have, size in zip(after, shape, strict=True)):
                        continue
                    sums = add(best[state][:, None], open_stages[last, group])
                    self.cuts += sums.size
                    first = sums.argmin(axis=0)
                    least = sums[first, np.arange(layers + 1)]
                    then = after, self._alike[group]
                    known = best.setdefault(then, np.full(layers + 1, np.inf))
                    came.setdefault(then, []).append((np.where(least < known, first, -1), group, state))
                    np.minimum(known, least, out=known)
        ends = {state: float(table[layers]) for state, table in best.items() if self._idle or state[0] == self._pools}
        if not ends:
            return math.inf, []
        state = min(ends, key=ends.__getitem__)
        total, stages, end = ends[state], [], layers
        while not math.isinf(total) and state != start:
            steps = ((int(at[end]), group, before) for at, group, before in reversed(came[state]))
            first, group, before = next(step for step in steps if step[0] >= 0)
            stages.append((before[1], group, first, end))
            state, end = before, first
        return total, stages[::-1]

    def unfit(self) -> InputError:
        """Return why no stages hold all layers."""
        for layer in range(self.layers):
            alone = [own[layer, layer + 1] for own in self._own]
            if np.isinf(alone).all():
                able = [group for group in self._groups if np.isfinite(group.seconds[layer])]
                if not able:
                    return InputError(f"layer {layer}: no group of devices can run it")
                lacking = [group.fixed + _most(group.bytes[..., layer]) - group.room for group in able]
                group, least = able[int(np.argmin(lacking))], min(lacking)
                return InputError(
                    f"layer {layer} alone needs {shown(group.room + least)} on {group.name}, which has "
                    f"{shown(group.room)}: {shown(least)} are missing"
                )
        needed = min(_most(group.bytes.sum(axis=-1)) for group in self._groups)
        return InputError(
            f"no stages from pools of {_named(self._pools)} devices hold all {self.layers} layers, which take "
            f"{shown(needed)} of a device if they are one stage: add devices, or make layers smaller"
        )


def _most(nbytes: npt.ArrayLike) -> float:
    """Return the bytes of the device that holds most."""
    return float(np.max(nbytes))


def _named(pools: Sequence[int]) -> str:
    """Return sizes of pools in words."""
    return " and ".join(map(str, pools))


def _sums(each: Floats) -> Floats:
    """Return [layers + 1, layers + 1], the sum from a layer to before another; infinity where there is none between."""
    count = len(each)
    sums = np.full((count + 1, count + 1), np.inf)
    for first in range(count):
        sums[first, first + 1 :] = np.cumsum(each[first:])
    return sums
