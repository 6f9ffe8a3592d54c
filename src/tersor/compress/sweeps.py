"""Passes over the columns of a weight, one column at a time for all rows, and the rest of the weight by blocks.

All tensors here are transposed and in the order of the `Hessian`: [columns, rows], so that a column lies in one piece.
What follows a block is one matrix product. Within a block the torch code here costs five or six small kernels a column
whatever the number of rows; it is the definition, and what `serve_with` enters for a type of device takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TypeAlias

import torch

from tersor.compress.grid import Grid
from tersor.compress.hessian import BLOCK as BLOCK
from tersor.compress.hessian import Hessian

Block: TypeAlias = Callable[[int, int], None]
"""Goes over the columns from a first one to one behind the last, at most `BLOCK`; the first is a multiple of that."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Codes and scales for rows of a weight, with what a scale is for each column worked out block by block.

    Attributes:
        values: float32 [IC, rows], decode(code) - zero point, columns in the Hessian's order.
        scale: float32 [G, rows], as stored.
        zero_point: float32 [G, rows], 0 where there are none.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def where(self, keep: torch.Tensor, other: Choice) -> Choice:
        """Return this choice for the rows where `keep` [rows] holds, and the other one elsewhere."""
        return Choice(
            torch.where(keep, self.values, other.values),
            torch.where(keep, self.scale, other.scale),
            torch.where(keep, self.zero_point, other.zero_point),
        )

    def decoded(self, groups: torch.Tensor) -> torch.Tensor:
        """Return the weights that the choice stands for, float32 [IC, rows]; `groups` [IC] is the group of a column."""
        return self.values * self.scale[groups]


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a pass over the columns reads and writes; all tensors are contiguous.

    Attributes:
        given: float32 [IC, rows], the weights still wanted, or where values descend the gradients. A block changes its
            own columns, or leaves them as they are; the columns behind it change by a product.
        before: float32 [IC, rows], the values from which others descend; `None` where weights are rounded.
        scale, zero_point: float32 [G, rows].
        groups: int64 [IC], the group of every column.
        matrix: float32 [IC, IC]; what changed in a column moves to those behind it by its row.
        grid: the values there are.
        values: float32 [IC, rows], what comes out.
        changes: float32 [BLOCK, rows], what a block leaves for those behind it: errors, or changes of weights.
        kept: float32 [IC, rows], 1 where a weight has a value, 0 where it is zero, and was before; `None` where all
            have one.
    """

    given: torch.Tensor
    before: torch.Tensor | None
    scale: torch.Tensor
    zero_point: torch.Tensor
    groups: torch.Tensor
    matrix: torch.Tensor
    grid: Grid
    values: torch.Tensor
    changes: torch.Tensor
    kept: torch.Tensor | None = None

    def block(self, start: int, end: int) -> None:
        """Go over the columns of a block by torch."""
        here = self.groups[start:end]
        given, within, scales = self.given[start:end], self.matrix[start:end, start:end], self.scale[here]
        steps, ends = inverse(scales), self.grid.ends(self.zero_point[here])
        parts = (given, steps, *ends, scales, self.values[start:end], self.changes)
        masks = repeat(None) if self.kept is None else self.kept[start:end].unbind()
        if self.before is None:
            columns = zip(*(part.unbind() for part in parts), masks, strict=False)
            for after, (weights, step, low, high, size, out, error, mask) in enumerate(columns, 1):
                value = self.grid.nearest(weights * step, low, high, out)
                if mask is not None:
                    value.mul_(mask)
                torch.addcmul(weights, value, size, value=-1, out=error)
                given[after:].addr_(within[after - 1, after:], error, alpha=-1)
            return
        steps.div_(within.diagonal().unsqueeze(1))
        descending = zip(*(part.unbind() for part in (*parts, self.before[start:end])), masks, strict=False)
        for after, (slope, step, low, high, size, out, change, old, mask) in enumerate(descending, 1):
            value = self.grid.nearest(torch.addcmul(old, slope, step), low, high, out)
            if mask is not None:
                value.mul_(mask)
            torch.sub(value, old, out=change).mul_(size)
            given[after:].addr_(within[after - 1, after:], change, alpha=-1)


Serve: TypeAlias = Callable[[Sweep], Block | None]
"""Returns what goes over the blocks of a sweep in place of `Sweep.block`, or `None` where that is to do it."""

_servers: dict[str, Serve] = {}
"""Type of device -> who serves there."""


def serve_with(device: str, serve: Serve) -> None:
    """Let `serve` say who goes over blocks on a type of device.

    Raises:
        ValueError: somebody else does already.
    """
    if _servers.setdefault(device, serve) is not serve:
        raise ValueError(f"columns on a device of type {device} are served by {_servers[device]} already")


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """Return 1 / scale, and 0 where there is none, so that what has no scale gets the value 0."""
    return torch.where(scale > 0, scale.reciprocal(), 0.0)


def round_columns(
    target: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Grid,
    hessian: Hessian,
    groups: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round columns in turn, the error of each moved to the columns behind it (GPTQ, arXiv 2210.17323, algorithm 1).

    Args:
        target: float32 [IC, rows], the weights wanted, columns in the Hessian's order.
        scale, zero_point: float32 [G, rows], fixed.
        grid: the values there are.
        hessian: of the inputs.
        groups: int64 [IC], the group of every column.
        kept: float32 [IC, rows], 0 where a value is zero, as `Sweep.kept`.

    Returns:
        Values, float32 [IC, rows].
    """
    rest = target.clone(memory_format=torch.contiguous_format)
    changes, values = torch.empty_like(rest[:BLOCK]), torch.empty_like(rest)
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    mask = None if kept is None else kept.contiguous()
    sweep = Sweep(rest, None, scale, zero_point, groups, hessian.moves, grid, values, changes, mask)
    return _swept(sweep, hessian.behind[0])


def descend_columns(
    choice: Choice,
    gradient: torch.Tensor,
    grid: Grid,
    hessian: Hessian,
    groups: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Move every code in turn to where the layer's loss is least with all others as they are.

    Args:
        choice: the codes to start from, and the scales.
        gradient: float32 [IC, rows], the Hessian times (target - decoded).
        grid: the values there are.
        hessian: of the inputs.
        groups: int64 [IC], the group of every column.
        kept: float32 [IC, rows], 0 where a value is zero, as `Sweep.kept`.

    Returns:
        Values, float32 [IC, rows].
    """
    slopes = gradient.clone(memory_format=torch.contiguous_format)
    before, changes, values = choice.values.contiguous(), torch.empty_like(slopes[:BLOCK]), torch.empty_like(slopes)
    scale, zero_point = choice.scale.contiguous(), choice.zero_point.contiguous()
    mask = None if kept is None else kept.contiguous()
    sweep = Sweep(slopes, before, scale, zero_point, groups, hessian.ordered, grid, values, changes, mask)
    return _swept(sweep, hessian.behind[1])


def _swept(sweep: Sweep, behind: Sequence[torch.Tensor]) -> torch.Tensor:
    """Go over all columns, block by block; `behind` is how each block's changes move to the columns behind it."""
    given, changes = sweep.given, sweep.changes
    serve = _servers.get(given.device.type)
    block = (serve(sweep) if serve is not None and given.numel() else None) or sweep.block
    end = 0
    for moved in behind:
        start, end = end, end + BLOCK
        block(start, end)
        given[end:].addmm_(moved, changes, alpha=-1)
    block(end, len(given))
    return sweep.values
