"""The table of a row: which eight numbers are its weights best taken for? SqueezeLLM's codes (arXiv 2306.07629).

The numbers minimise the weighted squared error of a row, k-means in one dimension: there what is nearest to a number is
an interval, so that a row is sorted once and intervals are differences of running sums. The best of those that end at a
few dozen places are found exactly, and Lloyd's algorithm goes on from there. Against outputs of a layer, with all codes
as they are, the best table solves a small system of equations.
"""

from __future__ import annotations

import torch

from tersor.formats import SCALE_DTYPES, ScaleError, Scheme

CUTS = 64
"""Places of a sorted row at which intervals may end in the exact search, half of them by cost, half by value. What is
found loses 0.3 % more than the best; twice as many leave 0.1 %, and take three times as long."""
ROUNDS = 20
"""Of Lloyd's algorithm behind it, which moves the ends on to every place there is."""

_RIDGE = 1e-7
"""What is added to the diagonal of a row's equations, relative: numbers that few weights have stay apart."""

_CHOICES = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Pairs of places that the search looks at together, by type of device."""

_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Weights whose equations are made at once, by type of device."""


def fit_tables(rows: torch.Tensor, weights: torch.Tensor | None = None, size: int = 8) -> torch.Tensor:
    """Return the table of every row that loses least with each weight taken for its nearest number.

    Args:
        rows: float32 [rows, IC], finite.
        weights: float32 [IC] or [rows, IC], what a squared error costs, not negative; `None` is one for all.
        size: numbers of a table.

    Returns:
        float32 [rows, size], rising. A row of equal weights, or of weights that all cost nothing, is right as well.
    """
    height = max(1, _CHOICES.get(rows.device.type, _CHOICES["cpu"]) // CUTS**2)
    parts = []
    for start in range(0, len(rows), height):
        own = weights if weights is None or weights.ndim == 1 else weights[start : start + height]
        parts.append(_fitted(rows[start : start + height], own, size))
    return torch.cat(parts) if parts else rows.new_zeros(0, size)


def _fitted(rows: torch.Tensor, weights: torch.Tensor | None, size: int) -> torch.Tensor:
    ordered, order = rows.sort(dim=1)
    cost = torch.ones_like(rows) if weights is None else weights.expand_as(rows)
    cost = cost.gather(1, order).double()
    mass = _running(cost)
    moment = _running(cost * ordered)
    ends = _best_ends(ordered, mass, moment, size)
    tables = ordered.gather(1, ends[:, :-1].clamp_max(ordered.shape[1] - 1))
    for turn in range(ROUNDS + 1):
        whole, moved = (part.gather(1, ends).diff(dim=1) for part in (mass, moment))
        tables = torch.where(whole > 0, (moved / whole).float(), tables).sort(dim=1).values
        if turn < ROUNDS:
            inner = torch.searchsorted(ordered, (tables[:, 1:] + tables[:, :-1]) / 2, right=True)
            ends = torch.cat([ends[:, :1], inner, ends[:, -1:]], dim=1)
    return tables


def _running(values: torch.Tensor) -> torch.Tensor:
    """Return running sums along rows, one more than values, from zero on."""
    return torch.nn.functional.pad(values.cumsum(dim=1), (1, 0))


def _best_ends(ordered: torch.Tensor, mass: torch.Tensor, moment: torch.Tensor, size: int) -> torch.Tensor:
    """Return the ends of the intervals that lose least, of those that end at `CUTS` places: int64 [rows, size + 1].

    What an interval of cost m and moment a saves of the loss of its weights taken for zero is a^2 / m; the most that
    intervals up to a place save follows from what one interval less saves up to any place before (dynamic programme).
    """
    count = ordered.shape[1]
    share = torch.linspace(0, 1, CUTS // 2 + 1, device=ordered.device)[1:]
    by_cost = torch.searchsorted(mass[:, 1:].contiguous(), mass[:, -1:] * share.double(), right=True)
    low, high = ordered[:, :1], ordered[:, -1:]
    by_value = torch.searchsorted(ordered, low + (high - low) * share, right=True)
    cuts = torch.cat([torch.zeros_like(by_cost[:, :1]), by_cost, by_value], dim=1).clamp_max_(count)
    cuts[:, -1] = count
    cuts = cuts.sort(dim=1).values
    own_mass, own_moment = mass.gather(1, cuts), moment.gather(1, cuts)
    whole = own_mass.unsqueeze(1) - own_mass.unsqueeze(2)  # [rows, from, to]
    saved = (own_moment.unsqueeze(1) - own_moment.unsqueeze(2)).square_().div_(whole)
    saved.masked_fill_(whole <= 0, 0.0)
    saved.masked_fill_(torch.ones(saved.shape[1:], dtype=torch.bool, device=saved.device).tril(-1), -torch.inf)
    most, chosen = saved[:, 0], []
    for _ in range(size - 1):
        most, before = (most.unsqueeze(2) + saved).max(dim=1)
        chosen.append(before)
    place = torch.full_like(cuts[:, :1], cuts.shape[1] - 1)
    ends = [place]
    for before in reversed(chosen):
        place = before.gather(1, place)
        ends.append(place)
    ends.append(torch.zeros_like(place))
    return cuts.gather(1, torch.cat(ends[::-1], dim=1))


def store_tables(tables: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round tables to the scheme's dtype; what rises still does.

    Args:
        tables: float32 [rows, size].
        scheme: names the dtype.

    Raises:
        ScaleError: a number is beyond the dtype's largest; it names the row.
    """
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    stored = tables.to(dtype)
    finite = stored.isfinite().all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        largest = float(tables[row].abs().max())
        raise ScaleError(
            row,
            f"a weight of {largest:.3g} in row {{row}} is beyond {scheme.scale_dtype}'s largest number, "
            f"{torch.finfo(dtype).max:g}: use bfloat16 tables (--scale-dtype)",
        )
    return stored


def nearest_codes(rows: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Return the places of the numbers nearest to weights, int64 [rows, IC]; halfway between two, of the lower.

    Args:
        rows: float32 [rows, IC].
        tables: float32 [rows, size], rising.
    """
    return torch.searchsorted((tables[:, 1:] + tables[:, :-1]) / 2, rows.contiguous())


def nearest_in(tables: torch.Tensor, wanted: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return the numbers nearest to one weight of each row, in `out`.

    Args:
        tables: float32 [size, rows], rising down.
        wanted: float32 [rows].
        out: float32 [rows].
    """
    places = (wanted > (tables[1:] + tables[:-1]) / 2).sum(dim=0, keepdim=True)
    return torch.gather(tables, 0, places, out=out.unsqueeze(0)).squeeze(0)


def refit_tables(
    values: torch.Tensor,
    tables: torch.Tensor,
    gradient: torch.Tensor,
    matrix: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tables that lose least with codes as they are, and the places that codes say in them.

    With Z the places of a row's codes, [IC, size] of zeros and ones, the loss is quadratic in its table; the step to
    the least loss solves (Z^T H Z) d = Z^T H (w - Z t). The equations are solved in float64. A number that no weight
    has stays as it is.

    Args:
        values: float32 [IC, rows], numbers of the tables.
        tables: float32 [size, rows], rising down.
        gradient: float32 [IC, rows], the Hessian times (target - decoded).
        matrix: float32 [IC, IC], the damped Hessian.
        kept: float32 [IC, rows], 0 where a weight is none of the table's; `None` where all are.

    Returns:
        float32 [size, rows], rising down, and int64 [IC, rows].
    """
    height = max(1, _ELEMENTS.get(values.device.type, _ELEMENTS["cpu"]) // max(1, len(values)))
    parts = []
    for start in range(0, values.shape[1], height):
        here = slice(start, start + height)
        own = None if kept is None else kept[:, here]
        parts.append(_refitted(values[:, here], tables[:, here], gradient[:, here], matrix, own))
    return torch.cat([table for table, _ in parts], dim=1), torch.cat([places for _, places in parts], dim=1)


def places_of(values: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Return the places of numbers of tables, int64 [rows, IC]; of another number some place.

    Args:
        values: float32 [rows, IC].
        tables: float32 [rows, size], rising.
    """
    return torch.searchsorted(tables.contiguous(), values.contiguous()).clamp_max_(tables.shape[1] - 1)


def _refitted(
    values: torch.Tensor,
    tables: torch.Tensor,
    gradient: torch.Tensor,
    matrix: torch.Tensor,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    size, rows = tables.shape
    places = places_of(values.T, tables.T).T.contiguous()
    equations = values.new_zeros(size, size, rows, dtype=torch.float64)
    wanted = values.new_zeros(size, rows).scatter_add_(0, places, gradient if kept is None else gradient * kept)
    for place in range(size):
        own = (places == place).float()
        product = matrix @ (own if kept is None else own.mul_(kept))
        equations[place].scatter_add_(0, places, (product if kept is None else product * kept).double())
    system = equations.permute(2, 0, 1).contiguous()
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(diagonal > 0, diagonal * (1 + _RIDGE), 1.0))
    lower, failed = torch.linalg.cholesky_ex(system)
    step = torch.cholesky_solve(wanted.T.double().unsqueeze(2), lower).squeeze(2).float().T
    fits = torch.isfinite(step).all(dim=0) & (failed == 0)
    moved, order = torch.where(fits, tables + step, tables).sort(dim=0)
    return moved, order.argsort(dim=0).gather(0, places)
