"""What it takes to bring a value from one placement to another: collectives along the axes of the mesh, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from tersor.planner.graph.ir import Parts, Placement
from tersor.planner.graph.shares import largest

Places: TypeAlias = tuple[Placement, ...]
"""Where a value is, by axis of the mesh."""


class Links(Protocol):
    """Seconds of collectives among ranks that hold `size` bytes each, of a gather or all of a scatter when whole."""

    def all_reduce(self, size: float, ranks: int) -> float:
        """Every rank has an addend of `size` bytes, and then the sum."""

    def all_gather(self, size: float, ranks: int) -> float:
        """Every rank has a part, and then all `size` bytes."""

    def reduce_scatter(self, size: float, ranks: int) -> float:
        """Every rank has an addend of `size` bytes, and then a part of the sum."""

    def all_to_all(self, size: float, ranks: int) -> float:
        """Every rank has `size` bytes, and gives every other an equal part of them."""


@dataclass(frozen=True, slots=True)
class Ring:
    """Links by two numbers: what a step of a ring costs, and how fast a rank sends.

    Attributes:
        latency: seconds a step.
        bandwidth: bytes per second that a rank sends, while it receives as many.
    """

    latency: float
    bandwidth: float

    def all_reduce(self, size: float, ranks: int) -> float:
        """A scatter of sums, then a gather."""
        return self.reduce_scatter(size, ranks) + self.all_gather(size, ranks)

    def all_gather(self, size: float, ranks: int) -> float:
        """Parts go round."""
        return (ranks - 1) * (self.latency + size / ranks / self.bandwidth)

    def reduce_scatter(self, size: float, ranks: int) -> float:
        """Sums go round."""
        return (ranks - 1) * (self.latency + size / ranks / self.bandwidth)

    def all_to_all(self, size: float, ranks: int) -> float:
        """A part to every other rank."""
        return (ranks - 1) * (self.latency + size / ranks / self.bandwidth)


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of the mesh.

    Attributes:
        name: such as "data" or "tensor".
        ranks: how many devices lie along it.
        links: what joins them.
    """

    name: str
    ranks: int
    links: Links


Mesh: TypeAlias = tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One collective.

    Attributes:
        kind: "all_reduce", "all_gather", "reduce_scatter" or "all_to_all".
        axis: index of the axis along which ranks take part.
        bytes: what the table of `Links` is asked for.
        seconds: what it says.
    """

    kind: str
    axis: int
    bytes: float
    seconds: float


def held(size: float, places: Places, mesh: Mesh, parts: Parts = ()) -> float:
    """Return the bytes that the rank with most holds of a value of `size` bytes, whose dimensions have these parts."""
    for axis, place in zip(mesh, places, strict=True):
        if place.kind == "cut":
            whole = parts[place.dim][place.part] if parts else axis.ranks
            size *= 1 / axis.ranks if whole % axis.ranks == 0 else largest(whole, axis.ranks) / whole
    return size


class Moves:
    """Collectives between placements on one mesh; what was asked once is known."""

    def __init__(self, mesh: Mesh) -> None:
        """Begin with nothing known."""
        self.mesh = mesh
        self._known: dict[tuple[float, Places, Places, Parts], tuple[Step, ...]] = {}

    def between(self, size: float, source: Places, target: Places, parts: Parts = ()) -> tuple[Step, ...]:
        """Return the collectives that bring a value of `size` bytes from one placement to another.

        Axes are moved one behind the other, in the order that takes least. Slices of what is whole cost nothing, and
        neither does calling it an addend, which one rank has. Uneven parts are as long as the longest; without `parts`
        all are even.
        """
        key = (size, source, target, parts)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._in_order(key, self.order(size, source, target, parts))
        return found

    def order(self, size: float, source: Places, target: Places, parts: Parts = ()) -> tuple[int, ...]:
        """Return the axes that are moved, in the order that takes least."""
        axes = [axis for axis, pair in enumerate(zip(source, target, strict=True)) if pair[0] != pair[1]]
        key = (size, source, target, parts)
        return min(itertools.permutations(axes), key=lambda order: seconds(self._in_order(key, order)))

    def seconds(self, size: float, source: Places, target: Places, parts: Parts = ()) -> float:
        """Return the seconds of these collectives."""
        return seconds(self.between(size, source, target, parts)) if source != target else 0.0

    def _in_order(self, key: tuple[float, Places, Places, Parts], order: Sequence[int]) -> tuple[Step, ...]:
        size, source, target, parts = key
        steps, now = [], list(source)
        for axis in order:
            before = held(size, tuple(now), self.mesh, parts)
            now[axis] = target[axis]
            kind = _kind(source[axis].kind, target[axis].kind)
            if kind:
                bytes_ = before * self.mesh[axis].ranks if kind == "all_gather" else before  # parts are padded
                table = getattr(self.mesh[axis].links, kind)
                steps.append(Step(kind, axis, bytes_, table(bytes_, self.mesh[axis].ranks)))
        return tuple(steps)


def _kind(source: str, target: str) -> str:
    """Return the collective between two kinds of placement that differ, or nothing."""
    if source == "whole":
        return ""
    if source == "cut":
        return "all_to_all" if target == "cut" else "all_gather"
    return "all_reduce" if target == "whole" else "reduce_scatter"


def seconds(steps: Sequence[Step]) -> float:
    """Return what collectives take, one behind the other."""
    return sum(step.seconds for step in steps)
