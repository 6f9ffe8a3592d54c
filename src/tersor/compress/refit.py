"""The scales of rows whose codes are fixed, in closed form: each row solves the normal equations of its groups."""

from __future__ import annotations

import torch

from tersor.compress.grid import Grid

_RIDGE = 1e-7
"""What is added to the diagonal of a row's equations, relative: groups whose codes say nearly the same stay apart."""

_ELEMENTS = 1 << 26
"""Entries of all equations solved at once: rows are taken in turn where groups are many."""

_PRODUCTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Entries of the products of groups made at once, by type of device: of few rows, those of all groups."""


def refit_scales(
    values: torch.Tensor,
    scale: torch.Tensor,
    gradient: torch.Tensor,
    matrix: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Return the scales that lose least with codes as they are, rounded to the scheme's scale dtype.

    With V_g the values of group g and zeros elsewhere, the loss of a row is quadratic in its scales s, with
    A_gh = V_g H V_h^T; the step from s to the least loss solves A d = V H (w - V s). A group without codes, a step to
    a scale that is not positive, and equations that have no factor leave scales as they are. The equations are solved
    in float64: neighbouring groups of a singular Hessian are nearly dependent.

    Args:
        values: float32 [IC, rows], columns in natural order.
        scale: float32 [G, rows], as stored.
        gradient: float32 [IC, rows], the Hessian times (target - decoded), columns in natural order.
        matrix: float32 [IC, IC], the damped Hessian in natural order.
        grid: rounds scales.

    Returns:
        Scales as stored, float32 [G, rows].
    """
    rows, groups = values.shape[1], grid.groups
    height = max(1, _ELEMENTS // (groups * groups))
    parts = [
        _steps(values[:, start : start + height], gradient[:, start : start + height], matrix, groups)
        for start in range(0, rows, height)
    ]
    wanted = scale + torch.cat(parts, dim=1)
    fits = torch.isfinite(wanted) & (wanted > 0) & (scale > 0)
    return torch.where(fits, grid.rounded(torch.where(fits, wanted, 1.0).T).T, scale)


def _steps(values: torch.Tensor, gradient: torch.Tensor, matrix: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the step of every scale, float32 [G, rows]."""
    ic, rows = values.shape
    size = ic // groups
    equations = torch.zeros(rows, groups, groups, dtype=torch.float64, device=values.device)
    grouped = values.reshape(groups, size, rows)
    most = max(1, _PRODUCTS.get(values.device.type, _PRODUCTS["cpu"]) // max(1, ic * rows))
    for first in range(0, groups, most):
        last = min(first + most, groups)
        behind = slice(first * size, ic)  # a Cholesky factor reads the lower triangle alone
        blocks = matrix[behind, first * size : last * size].unflatten(1, (-1, size)).transpose(0, 1)
        product = (blocks @ grouped[first:last]).mul_(values[behind])
        sums = product.view(last - first, groups - first, size, rows).sum(dim=2)
        equations[:, first:, first:last] = sums.permute(2, 1, 0)
    wanted = (values * gradient).reshape(groups, size, rows).sum(dim=1).T.double()
    diagonal = equations.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(diagonal > 0, diagonal * (1 + _RIDGE), 1.0))
    lower, _ = torch.linalg.cholesky_ex(equations)
    return torch.cholesky_solve(wanted.unsqueeze(2), lower).squeeze(2).float().T
