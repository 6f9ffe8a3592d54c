"""Moves a tensor from one placement to another among ranks, with gradients: what a plan of `planner.graph` asks for.

Collectives are those that every backend of torch.distributed has for lists of tensors; slices are strided where the
plan cuts a part of a dimension that is not its first, which is why they are made and put together here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from tersor.errors import LostError
from tersor.planner.graph.ir import SUM, WHOLE, Parts, Placement
from tersor.planner.graph.local import join, take
from tersor.planner.graph.moves import Moves, Places


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
            order = self._moves.order(tensor.numel() * tensor.element_size(), source, target)
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
            pieces = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(line.ranks)]
            self._call(lambda: distributed.all_gather(pieces, tensor.contiguous(), group=line.group))
            tensor, source = join(pieces, source, parts), WHOLE
        if source == WHOLE:
            return take(tensor, target, parts, line.rank, line.ranks)
        if target == WHOLE:
            summed = tensor.contiguous().clone()
            self._call(lambda: distributed.all_reduce(summed, group=line.group))
            return summed
        if source == SUM:
            pieces = [take(tensor, target, parts, rank, line.ranks).contiguous() for rank in range(line.ranks)]
            mine = torch.empty_like(pieces[0])
            self._call(lambda: distributed.reduce_scatter(mine, pieces, group=line.group))
            return mine
        before = self._divided(parts, source, line.ranks)
        sent = [take(tensor, target, before, rank, line.ranks).contiguous() for rank in range(line.ranks)]
        received = [torch.empty_like(sent[line.rank]) for _ in range(line.ranks)]
        self._call(lambda: distributed.all_to_all(received, sent, group=line.group))
        return join(received, source, self._divided(parts, target, line.ranks))

    def _left(self, parts: Parts, places: Sequence[Placement]) -> Parts:
        """Return the parts of a rank's tensor at these placements."""
        for line, place in zip(self.lines, places, strict=True):
            if place.kind == "cut":
                parts = self._divided(parts, place, line.ranks)
        return parts

    @staticmethod
    def _divided(parts: Parts, place: Placement, ranks: int) -> Parts:
        sizes = [list(of_dim) for of_dim in parts]
        sizes[place.dim][place.part] //= ranks
        return tuple(tuple(of_dim) for of_dim in sizes)

    @staticmethod
    def _call(collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise LostError(f"a rank of the plan cannot be reached: {lines[0]}") from error


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
