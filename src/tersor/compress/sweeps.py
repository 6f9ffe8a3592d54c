"""Passes over the columns of a weight, one column at a time for all rows, and the rest of the weight by blocks.

All tensors here are transposed and in the order of the `Hessian`: [columns, rows], so that a column lies in one piece.
A column costs five or six small kernels whatever the number of rows; what follows a block is one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tersor.compress.grid import Grid
from tersor.compress.hessian import Hessian

BLOCK = 128
"""Columns of a block: what one column changes is written at once within it, and as a product behind it."""


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
) -> torch.Tensor:
    """Round columns in turn, the error of each moved to the columns behind it (GPTQ, arXiv 2210.17323, algorithm 1).

    Args:
        target: float32 [IC, rows], the weights wanted, columns in the Hessian's order.
        scale, zero_point: float32 [G, rows], fixed.
        grid: the values there are.
        hessian: of the inputs.
        groups: int64 [IC], the group of every column.

    Returns:
        Values, float32 [IC, rows].
    """
    rest = target.clone()
    values = torch.empty_like(rest)
    errors = torch.empty_like(rest[:BLOCK])
    factor = hessian.factor / hessian.factor.diagonal().unsqueeze(1)
    for start in range(0, len(rest), BLOCK):
        end = min(start + BLOCK, len(rest))
        here = groups[start:end]
        block, within, scales = rest[start:end], factor[start:end, start:end], scale[here]
        parts = (block, inverse(scales), *grid.ends(zero_point[here]), scales, values[start:end], errors)
        columns = zip(*(part.unbind() for part in parts), strict=False)
        for after, (weights, steps, low, high, size, out, error) in enumerate(columns, 1):
            value = grid.nearest(weights * steps, low, high, out)
            torch.addcmul(weights, value, size, value=-1, out=error)
            block[after:].addr_(within[after - 1, after:], error, alpha=-1)
        rest[end:].addmm_(factor[start:end, end:].T, errors[: end - start], alpha=-1)
    return values


def descend_columns(
    choice: Choice, gradient: torch.Tensor, grid: Grid, hessian: Hessian, groups: torch.Tensor
) -> torch.Tensor:
    """Move every code in turn to where the layer's loss is least with all others as they are.

    Args:
        choice: the codes to start from, and the scales.
        gradient: float32 [IC, rows], the Hessian times (target - decoded); it is overwritten.
        grid: the values there are.
        hessian: of the inputs.
        groups: int64 [IC], the group of every column.

    Returns:
        Values, float32 [IC, rows].
    """
    values = torch.empty_like(choice.values)
    changes = torch.empty_like(values[:BLOCK])
    matrix, diagonal = hessian.ordered, hessian.ordered.diagonal()
    for start in range(0, len(values), BLOCK):
        end = min(start + BLOCK, len(values))
        here = groups[start:end]
        block, within, scales = gradient[start:end], matrix[start:end, start:end], choice.scale[here]
        steps = inverse(scales) / diagonal[start:end].unsqueeze(1)
        ends = grid.ends(choice.zero_point[here])
        parts = (choice.values[start:end], block, steps, *ends, scales, values[start:end], changes)
        columns = zip(*(part.unbind() for part in parts), strict=False)
        for after, (old, slope, step, low, high, size, out, change) in enumerate(columns, 1):
            value = grid.nearest(torch.addcmul(old, slope, step), low, high, out)
            torch.sub(value, old, out=change).mul_(size)
            block[after:].addr_(within[after - 1, after:], change, alpha=-1)
        gradient[end:].addmm_(matrix[start:end, end:].T, changes[: end - start], alpha=-1)
    return values
