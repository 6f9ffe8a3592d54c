"""Rounding against both sides of a layer: minimise tr(H_O E H E^T), H_O the second moments of its output gradients.

This is YAQA's objective (arXiv 2505.22988). Blocks of rows are rounded in the order of falling diagonal of H_O, each
against the Hessian of its inputs, and the error of a block moves to the rows behind it as GPTQ moves that of a column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tersor.compress.hessian import OUTPUT_DAMPING, Hessian
from tersor.compress.refine import Judged, Layer
from tersor.compress.sweeps import Choice

ROW_BLOCK = 16
"""Rows of a block: their errors do not know of each other. Of 128, half of the gain is gone."""

ROUNDS = 2
"""Refits of the scales of a block, each with a descent of the codes after it; a third lowers the loss by 1 %."""


@dataclass(frozen=True, slots=True)
class OutputHessian:
    """The output side in P pieces of n rows along the diagonal, each by falling diagonal, relative to `unit`.

    Attributes:
        order: int64 [P, n], the rows of the weight of each piece, in the order in which they are rounded.
        matrix: float32 [P, n, n], damped, in that order.
        factor: float32 [P, n, n], upper triangular U with U^T U the inverse of `matrix`.
        unit: mean of the diagonal that calibration summed up.
    """

    order: torch.Tensor
    matrix: torch.Tensor
    factor: torch.Tensor
    unit: float

    @staticmethod
    def of(matrix: torch.Tensor, name: str) -> OutputHessian:
        """Damp and factor what calibration summed up, float [OC, OC] or [P, OC / P, OC / P].

        Raises:
            InputError: as `Hessian.of`.
        """
        given = matrix if matrix.ndim == 3 else matrix.unsqueeze(0)
        pieces = [Hessian.of(piece, OUTPUT_DAMPING, name) for piece in given]
        sums = [piece.unit if bool(part.any()) else 0.0 for piece, part in zip(pieces, given, strict=True)]
        unit = sum(sums) / len(sums) or 1.0
        units = [one if one > 0 else OUTPUT_DAMPING * unit for one in sums]
        shares = torch.tensor(units, device=matrix.device).div_(unit).view(-1, 1, 1)
        size = pieces[0].size
        return OutputHessian(
            torch.stack([piece.order + index * size for index, piece in enumerate(pieces)]),
            torch.stack([piece.ordered for piece in pieces]) * shares,
            torch.stack([piece.factor for piece in pieces]) / shares.sqrt(),
            unit,
        )

    def loss(self, error: torch.Tensor, gradient: torch.Tensor) -> float:
        """Return tr(H_O E H E^T) of all rows, for E and E H, float32 [OC, IC], relative to both units."""
        return float(((self.matrix @ error[self.order]) * gradient[self.order]).sum(dtype=torch.float64))

    def blocks(self) -> list[slice]:
        """Return the blocks of `ROW_BLOCK` rows that a piece has, the same of all pieces at a time."""
        rows = self.order.shape[1]
        return [slice(start, min(start + ROW_BLOCK, rows)) for start in range(0, rows, ROW_BLOCK)]


class _Rows:
    """The choice for all rows of a weight while blocks of them change, rows in the output side's order.

    Attributes:
        target: float32 [P, n, IC], the weights wanted.
        error: float32 [P, n, IC], target - decoded.
    """

    def __init__(self, layer: Layer, output: OutputHessian, target: torch.Tensor, choice: Choice) -> None:
        self._layer, self._order = layer, output.order
        self._parts = [part[:, output.order] for part in choice.parts]
        self.target = target.T[output.order]
        self.error = self.target - self.decoded(self.of(slice(None)))

    def of(self, block: slice) -> Choice:
        """Return the choice for one block of every piece, P * k rows."""
        return Choice(*(part[:, :, block].flatten(1) for part in self._parts))

    def put(self, block: slice, choice: Choice) -> None:
        """Take another choice for one block of every piece."""
        pieces = len(self._order)
        for own, part in zip(self._parts, choice.parts, strict=True):
            own[:, :, block] = part.unflatten(1, (pieces, -1))
        self.error[:, block] = self.target[:, block] - self.decoded(choice)

    def decoded(self, choice: Choice) -> torch.Tensor:
        """Return what the choice for one block of every piece stands for, float32 [P, k, IC]."""
        return choice.decoded(self._layer.groups).T.unflatten(0, (len(self._order), -1))

    def choice(self) -> Choice:
        """Return the choice for all rows, as they come in the weight."""
        back = torch.argsort(self._order.flatten())
        return Choice(*(part.flatten(1).index_select(1, back) for part in self._parts))


def refine_two_sided(
    layer: Layer, output: OutputHessian, target: torch.Tensor, start: Judged
) -> tuple[float, float, Choice]:
    """Choose codes and scales for all rows of a layer.

    Args:
        layer: grid and Hessian of the inputs.
        output: the other side.
        target: float32 [IC, OC], the weights wanted, columns in the Hessian's order.
        start: round to nearest, judged against the target.

    Returns:
        The loss of `start`, that of the choice, and the choice: the least by tr(H_O E H E^T) of round to nearest, of
        rows refined each for itself, and of blocks of rows that correct each other. None is taken whose outputs err
        more than those of round to nearest, tr(E H E^T): gradients of few tokens say little about rare ones.
    """
    alone = layer.refine(target, start)
    rows = _Rows(layer, output, target, alone.choice)
    _round_blocks(layer, output, rows)
    _descend_blocks(layer, output, rows)
    together = layer.judge(target, rows.choice())
    before, best, after = _loss(layer, output, target, start), start, math.inf
    for judged in (start, alone, together):
        loss = _loss(layer, output, target, judged)
        if loss < after and float(judged.loss.sum()) <= float(start.loss.sum()):
            best, after = judged, loss
    return before, min(before, after), best.choice


def _loss(layer: Layer, output: OutputHessian, target: torch.Tensor, judged: Judged) -> float:
    return output.loss((target - judged.choice.decoded(layer.groups)).T, judged.gradient.T)


def _round_blocks(layer: Layer, output: OutputHessian, rows: _Rows) -> None:
    """Round blocks of rows in turn, the error of each moved to the rows behind it."""
    wanted = rows.target.clone()
    for block in output.blocks():
        goal = wanted[:, block].flatten(0, 1).T.contiguous()
        own = layer.of_rows(output.order[:, block].flatten())
        chosen = own.refine(goal, own.judge(goal, rows.of(block)), ROUNDS).choice
        rows.put(block, chosen)
        behind = slice(block.stop, None)
        factor = output.factor[:, block]
        moved = torch.linalg.solve_triangular(factor[:, :, block], factor[:, :, behind], upper=True)
        wanted[:, behind].sub_(moved.mT @ (wanted[:, block] - rows.decoded(chosen)))


def _descend_blocks(layer: Layer, output: OutputHessian, rows: _Rows) -> None:
    """Polish blocks of rows in turn with all others as they are; a block is kept where the whole loss is lower."""
    pieces = len(output.order)
    for block in output.blocks():
        matrix = output.matrix[:, block]
        own = matrix[:, :, block]
        choice = rows.of(block)
        best = rows.decoded(choice) + torch.linalg.solve_ex(own, matrix @ rows.error)[0]
        goal = best.flatten(0, 1).T.contiguous()
        before = layer.judge(goal, choice)
        after = layer.of_rows(output.order[:, block].flatten()).polish(goal, before, ROUNDS)

        def loss(judged: Judged, goal: torch.Tensor = goal, own: torch.Tensor = own) -> torch.Tensor:
            error = (goal - judged.choice.decoded(layer.groups)).T.unflatten(0, (pieces, -1))
            return ((own @ error) * judged.gradient.T.unflatten(0, (pieces, -1))).sum(dim=(1, 2), dtype=torch.float64)

        keep = (loss(after) < loss(before)).repeat_interleave(own.shape[1])
        rows.put(block, after.choice.where(keep, choice))
