"""Rows of a weight against the Hessian of their inputs: search, rounding with moved errors, refits and descents.

Rows do not influence each other here, and every step is kept for the rows whose loss it lowers, for no others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tersor.compress.grid import Grid
from tersor.compress.hessian import Hessian
from tersor.compress.refit import refit_scales
from tersor.compress.sweeps import Choice, descend_columns, round_columns
from tersor.compress.tables import fit_tables, refit_tables

ROUNDS = 3
"""Refits of the scales, each with a descent of the codes after it."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A choice for rows, with what it loses against the rows wanted.

    Attributes:
        choice: codes and scales.
        gradient: float32 [IC, rows], the Hessian times (target - decoded), columns in the Hessian's order.
        loss: float64 [rows], (target - decoded) H (target - decoded)^T of every row.
    """

    choice: Choice
    gradient: torch.Tensor
    loss: torch.Tensor

    def better(self, other: Judged) -> Judged:
        """Return for every row the other choice where it loses less, a finite loss, and this one elsewhere."""
        keep = other.loss < self.loss
        return Judged(
            other.choice.where(keep, self.choice),
            torch.where(keep, other.gradient, self.gradient),
            torch.where(keep, other.loss, self.loss),
        )


@dataclass(frozen=True, slots=True)
class Layer:
    """What the rows of a layer are rounded by: the grid, the Hessian, the group of every column in the Hessian's order.

    `kept` is 0 where a weight is zero and remains so, else 1, float32 [IC, rows], columns in the Hessian's order;
    `None` where no weight has to be zero.
    """

    grid: Grid
    hessian: Hessian
    groups: torch.Tensor
    kept: torch.Tensor | None = None

    @staticmethod
    def of(grid: Grid, hessian: Hessian, kept: torch.Tensor | None = None) -> Layer:
        """Put a grid and a Hessian of as many channels together, and a mask [rows, IC], where there is one."""
        groups = torch.div(hessian.order * grid.groups, hessian.size, rounding_mode="floor")
        mask = None if kept is None else kept.T.index_select(0, hessian.order).float()
        return Layer(grid, hessian, groups, mask)

    def of_rows(self, rows: torch.Tensor) -> Layer:
        """Return the layer of some rows, int64 [rows], in that order."""
        return self if self.kept is None else replace(self, kept=self.kept[:, rows].contiguous())

    def columns(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [rows, IC] as columns in the Hessian's order, [IC, rows]."""
        return rows.T.index_select(0, self.hessian.order)

    def rows(self, columns: torch.Tensor) -> torch.Tensor:
        """Return columns in the Hessian's order [IC, rows] as rows in natural order, [rows, IC]."""
        return self._natural(columns).T

    def _natural(self, columns: torch.Tensor) -> torch.Tensor:
        return columns.index_select(0, self.hessian.back)

    def judge(self, target: torch.Tensor, choice: Choice) -> Judged:
        """Return a choice with its loss against a target, float32 [IC, rows]."""
        error = target - choice.decoded(self.groups)
        gradient = self.hessian.ordered @ error
        return Judged(choice, gradient, (gradient * error).sum(dim=0, dtype=torch.float64))

    def round(self, target: torch.Tensor) -> Judged:
        """Choose scales by the search, or tables, and codes column by column; the target is float32 [IC, rows]."""
        if self.grid.scheme.has_table:
            return self._round_to_tables(target)
        scale, zero_point = (
            part.T.contiguous() for part in self.grid.search(self.rows(target), self.hessian.weights())
        )
        values = round_columns(target, scale, zero_point, self.grid, self.hessian, self.groups, self.kept)
        return self.judge(target, Choice(values, scale, zero_point))

    def _round_to_tables(self, target: torch.Tensor) -> Judged:
        """Round with two tables, fitted by the weights of GPTQ and with all weights alike; either may lose less."""
        rows = self.rows(target).contiguous()
        alike = None if self.kept is None else self.rows(self.kept)
        weights = self.hessian.weights() if alike is None else self.hessian.weights() * alike
        found: Judged | None = None
        for cost in (weights, alike):
            tables = self.grid.rounded_tables(fit_tables(rows, cost)).T.contiguous()
            choice = Choice.of_tables(target, tables)
            of = (self.grid, self.hessian, self.groups, self.kept, tables)
            values = round_columns(target, choice.scale, choice.zero_point, *of)
            judged = self.judge(target, replace(choice, values=values))
            found = judged if found is None else found.better(judged)
        assert found is not None
        return found

    def polish(self, target: torch.Tensor, best: Judged, rounds: int = ROUNDS) -> Judged:
        """Refit scales, or tables, and descend codes in turn, and keep what lowers the loss of a row."""
        for _ in range(rounds):
            if self.grid.scheme.scale_dtype != "e8m0":  # the nearest power of two is far from a scale refitted
                best = best.better(self.judge(target, self._refitted(best)))
            choice = best.choice
            values = descend_columns(choice, best.gradient, self.grid, self.hessian, self.groups, self.kept)
            best = best.better(self.judge(target, replace(choice, values=values)))
        return best

    def _refitted(self, best: Judged) -> Choice:
        choice = best.choice
        if choice.tables is not None:
            kept = None if self.kept is None else self._natural(self.kept)
            values, gradient = self._natural(choice.values), self._natural(best.gradient)
            wanted = refit_tables(values, choice.tables, gradient, self.hessian.natural, kept)
            return self._numbers(choice, *wanted)
        scale = refit_scales(
            self._natural(choice.values), choice.scale, self._natural(best.gradient), self.hessian.natural, self.grid
        )
        return replace(choice, scale=scale)

    def _numbers(self, choice: Choice, tables: torch.Tensor, places: torch.Tensor) -> Choice:
        """Return the choice of numbers at places [IC, rows], in natural order, of other tables, once stored."""
        stored = self.grid.rounded_tables(tables.T).T.contiguous()
        values = stored.gather(0, places).index_select(0, self.hessian.order)
        return replace(choice, values=values if self.kept is None else values * self.kept, tables=stored)

    def refine(self, target: torch.Tensor, start: Judged | None = None, rounds: int = ROUNDS) -> Judged:
        """Round and polish; rows for which `start` loses less than what was rounded go on from there.

        Args:
            target: float32 [IC, rows], the weights wanted, columns in the Hessian's order.
            start: a choice judged against the same target.
            rounds: of `polish`.
        """
        rounded = self.round(target)
        return self.polish(target, start.better(rounded) if start is not None else rounded, rounds)
