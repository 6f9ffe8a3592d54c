"""Moves a tensor from one placement to another among ranks, with gradients: what a plan of `planner.graph` asks for.

Collectives are those that every backend of torch.distributed has for lists of tensors; slices are strided where the
plan cuts a part of a dimension that is not its first, which is why they are made and put together here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.nn import functional

from tersor.errors import LostError
from tersor.planner.graph.ir import SUM, WHOLE, Parts, Placement
from tersor.planner.graph.local import join, take
from tersor.planner.graph.moves import Moves, Places
from tersor.planner.graph.shares import span


@dataclass(frozen=True, slots=True)
class Line:
    """The ranks along one axis of the mesh, as one of them sees them.

    Attributes:
        group: their process group.
        rank: the index of this one.
        ranks: how many they are.
    """

    group: ProcessGroup
    rank: int
    ranks: int


class Mover:
    """Moves tensors of one rank along the axes of a mesh."""

    def __init__(self, lines: Sequence[Line], moves: Moves) -> None:
        """Take the ranks along each axis, and the costs by which axes are ordered."""
        self.lines = tuple(lines)
        self._moves = moves

    def slice(self, tensor: torch.Tensor, places: Places, parts: Parts) -> torch.Tensor:
        """Return this rank's part of a whole tensor."""
        return self.move(tensor, (WHOLE,) * len(self.lines), places, parts)

    def move(self, tensor: torch.Tensor, source: Places, target: Places, parts: Parts) -> torch.Tensor:
        """Return this rank's part at `target` of a value that is at `source`; `parts` are those of the whole value.

        A part that several axes cut is gathered from all of them before it is cut again.
        """
        twice = {place for place in (*source, *target) if place.kind == "cut" and len(_axes(place, source, target)) > 1}
        now = list(source)
        if source != target and twice:
            for axis in reversed(range(len(now))):
                if now[axis] in twice:
                    tensor = self._along(axis, tensor, now, WHOLE, parts)
            order: Sequence[int] = [axis for axis in range(len(now)) if now[axis] != target[axis]]
        else:
            # Every rank goes by the size of the whole value: uneven slices would be moved in different orders.
            size = math.prod(size for of_dim in parts for size in of_dim) * tensor.element_size()
            order = self._moves.order(size, source, target, parts)
        for axis in order:
            tensor = self._along(axis, tensor, now, target[axis], parts)
        return tensor

    def _along(
        self, axis: int, tensor: torch.Tensor, now: list[Placement], target: Placement, parts: Parts
    ) -> torch.Tensor:
        """Move along one axis; `now` becomes where the value is."""
        line, source = self.lines[axis], now[axis]
        now[axis] = WHOLE
        parts = self._left(parts, now)
        now[axis] = target
        if source == target or line.ranks == 1:
            return tensor
        if source.kind == "cut" and target.kind != "cut":
            shapes = [_shape(tensor, source, parts, rank, line.ranks) for rank in range(line.ranks)]
            mine, count = _padded(tensor, shapes)
            pieces = [tensor.new_empty(count) for _ in shapes]
            self._call(lambda: distributed.all_gather(pieces, mine, group=line.group))
            tensor, source = join([*map(_without, pieces, shapes)], source, parts), WHOLE
        if source == WHOLE:
            return take(tensor, target, parts, line.rank, line.ranks)
        if target == WHOLE:
            summed = tensor.contiguous().clone()
            self._call(lambda: distributed.all_reduce(summed, group=line.group))
            return summed
        if source == SUM:
            pieces = [take(tensor, target, parts, rank, line.ranks) for rank in range(line.ranks)]
            shapes = [tuple(piece.shape) for piece in pieces]
            pieces = [_padded(piece, shapes)[0] for piece in pieces]
            mine = torch.empty_like(pieces[0])
            self._call(lambda: distributed.reduce_scatter(mine, pieces, group=line.group))
            return _without(mine, shapes[line.rank])
        before, after = (self._divided(parts, place, line.rank, line.ranks) for place in (source, target))
        sent = [take(tensor, target, before, rank, line.ranks) for rank in range(line.ranks)]
        shapes = [_shape(sent[line.rank], source, after, rank, line.ranks) for rank in range(line.ranks)]
        longest = _shape(sent[0], source, self._divided(parts, target, 0, line.ranks), 0, line.ranks)
        given = [_padded(piece, [longest])[0] for piece in sent]
        received = [torch.empty_like(one) for one in given]
        self._call(lambda: distributed.all_to_all(received, given, group=line.group))
        return join([*map(_without, received, shapes)], source, after)

    def _left(self, parts: Parts, places: Sequence[Placement]) -> Parts:
        """Return the parts of a rank's tensor at these placements."""
        for line, place in zip(self.lines, places, strict=True):
            if place.kind == "cut":
                parts = self._divided(parts, place, line.rank, line.ranks)
        return parts

    @staticmethod
    def _divided(parts: Parts, place: Placement, rank: int, ranks: int) -> Parts:
        """Return the parts that a rank has."""
        sizes = [list(of_dim) for of_dim in parts]
        sizes[place.dim][place.part] = span(sizes[place.dim][place.part], ranks, rank)[1]
        return tuple(tuple(of_dim) for of_dim in sizes)

    @staticmethod
    def _call(collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise LostError(f"a rank of the plan cannot be reached: {lines[0]}") from error


def _shape(like: torch.Tensor, place: Placement, parts: Parts, rank: int, ranks: int) -> tuple[int, ...]:
    """Return the shape of a rank's slice of a tensor of these parts, of which `like` is another slice."""
    sizes = list(parts[place.dim])
    sizes[place.part] = span(sizes[place.part], ranks, rank)[1]
    return (*like.shape[: place.dim], math.prod(sizes), *like.shape[place.dim + 1 :])


def _padded(tensor: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, int]:
    """Return a tensor as a vector as long as the longest of these shapes, and this length: all ranks send as much."""
    count = max(math.prod(shape) for shape in shapes)
    return functional.pad(tensor.reshape(-1), (0, count - tensor.numel())), count


def _without(vector: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return what was padded."""
    return vector[: math.prod(shape)].view(shape)


def _axes(place: Placement, source: Places, target: Places) -> set[int]:
    """Return the axes that cut a part before or after a move."""
    return {axis for places in (source, target) for axis, other in enumerate(places) if other == place}


class _Moved(torch.autograd.Function):
    """A move whose gradient is moved, too."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, there: torch.Tensor, back: Callable[[torch.Tensor], torch.Tensor]
    ) -> Any:
        ctx.back = back
        return there.view_as(there)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.back(gradients[0]), None, None


def moved(
    mover: Mover,
    tensor: torch.Tensor,
    there: torch.Tensor,
    parts: Parts,
    gradient: tuple[Places, Places],
) -> torch.Tensor:
    """Return `there`, what `tensor` was moved to, so that its gradient is moved from one placement to another."""
    if not tensor.requires_grad or not torch.is_grad_enabled():
        return there
    source, target = gradient
    back = lambda given: mover.move(given.contiguous(), source, target, parts)  # noqa: E731
    return cast(torch.Tensor, _Moved.apply(tensor, there.detach(), back))
