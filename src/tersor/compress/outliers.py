"""Which weights of every row are kept beside the codes, and what is left for those? SqueezeLLM's form.

With statistics of the layer those weights are kept that the codes would err most on, by the loss of the layer's outputs
to second order: (w - q)^2 times the mean square of the channel's inputs, q the nearest value with scales that are
searched without what is kept (arXiv 2306.07629 has the square of the gradient in its place). Without, the largest.
Every row keeps the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tersor.compress.grid import Grid
from tersor.compress.tables import fit_tables, nearest_codes
from tersor.errors import NonFiniteError
from tersor.formats import FLOAT_DTYPES, Encoded, Outliers, ScaleError, Scheme, outlier_columns, outlier_words

ROUNDS = 4
"""Searches of scales, each for another choice of outliers."""


@dataclass(frozen=True, slots=True)
class Parted:
    """Rows of a weight without their outliers.

    Attributes:
        words: int32 [OC, K], the outliers as they are stored; columns rise along a row.
        kept: bool [OC, IC], where they stand.
        rest: [OC, IC] in the weight's dtype, zero there.
        values: float32 [OC, IC], the outliers as they are stored, zero elsewhere.
    """

    words: torch.Tensor
    kept: torch.Tensor
    rest: torch.Tensor
    values: torch.Tensor


def part(
    weight: torch.Tensor, outliers: Outliers, grid: Grid | None = None, energy: torch.Tensor | None = None
) -> Parted:
    """Take the outliers out of rows of a weight.

    Args:
        weight: [OC, IC], float16, bfloat16 or float32, any device.
        outliers: how many of each row, and in which dtype.
        grid, energy: of the dense part, and float32 [IC], the mean square of every channel's inputs: those are taken
            that lose most on codes; the largest without them.

    Raises:
        NonFiniteError: the weight holds a NaN or an infinity, with its index.
        FormatError: rows are longer than columns are counted.
        ScaleError: an outlier is beyond the largest number of its dtype.
    """
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        row, column = (int(axis) for axis in (~finite).nonzero()[0])
        raise NonFiniteError((row, column), float(weight[row, column]))
    rows, count = weight.float(), outliers.per_row(weight.shape[1])
    columns = _largest(rows.abs(), count)
    if grid is not None and energy is not None:
        columns = _most_lossy(rows, columns, grid, energy)
    values = weight.gather(1, columns).to(FLOAT_DTYPES[outliers.dtype])
    _check_outliers(values, outliers)
    kept = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, columns, True)
    plain = torch.zeros(weight.shape, device=weight.device).scatter_(1, columns, values.float())
    return Parted(outlier_words(columns, values), kept, weight.masked_fill(kept, 0), plain)


def _check_outliers(values: torch.Tensor, outliers: Outliers) -> None:
    """Raise ScaleError, with the row, where an outlier in its dtype is not finite."""
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).nonzero()[0][0])
        raise ScaleError(row, f"an outlier in row {{row}} is beyond {outliers.dtype}'s largest number: keep none there")


def _most_lossy(rows: torch.Tensor, found: torch.Tensor, grid: Grid, energy: torch.Tensor) -> torch.Tensor:
    """Return the columns that lose most on codes whose scales are searched without them, int64 [OC, K].

    Scales follow from what is kept, and what is kept from scales: both in turn from the columns `found`, and of all
    rounds the one with which a row loses least.
    """
    best, least = found, torch.full((len(rows),), torch.inf, device=rows.device)
    for _ in range(ROUNDS):
        lost = losses(rows.scatter(1, found, 0.0), rows, grid, energy)
        loss = lost.sum(dim=1) - lost.gather(1, found).sum(dim=1)
        better = loss < least
        best, least = torch.where(better.unsqueeze(1), found, best), torch.where(better, loss, least)
        found = _largest(lost, found.shape[1])
    return best


def _largest(score: torch.Tensor, count: int) -> torch.Tensor:
    """Return the columns of the `count` largest of each row, int64, rising; of equal ones those that come first.

    So a GPU, whose `topk` has an order of its own among these, chooses as a CPU does.
    """
    least = score.topk(count, dim=1).values[:, -1:]
    above, equal = score > least, score == least
    left = count - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= left))
    return chosen.nonzero()[:, 1].view(len(score), count)


def losses(rest: torch.Tensor, rows: torch.Tensor, grid: Grid, energy: torch.Tensor) -> torch.Tensor:
    """Return what the outputs lose by every weight on its nearest code, float32 [OC, IC].

    Args:
        rest: float32 [OC, IC], what scales are searched for.
        rows: float32 [OC, IC], the weights.
        grid, energy: as `part` takes them.
    """
    if grid.scheme.has_table:
        table = grid.rounded_tables(fit_tables(rest, energy * (rest != 0)))
        return table.gather(1, nearest_codes(rows, table)).sub_(rows).square_().mul_(energy)
    scale, zero_point = (part.unsqueeze(2) for part in grid.search(rest, energy))
    wanted = rows.view(len(rows), grid.groups, -1) / torch.where(scale > 0, scale, 1.0)
    low, high = (end.expand_as(wanted).flatten() for end in grid.ends(zero_point))
    nearest = grid.nearest(wanted.flatten(), low, high, torch.empty_like(wanted).flatten())
    return (nearest.view_as(wanted) * scale).view_as(rows).sub_(rows).square_().mul_(energy)


def beside(encoded: Encoded, parted: Parted, weight: torch.Tensor, scheme: Scheme) -> Encoded:
    """Return codes of what is left with the outliers beside them, and the errors of both against the weight."""
    if scheme.has_table:
        encoded, parted = _beside_tables(encoded, parted, weight, scheme)
    error = parted.values.double() - weight.double().where(parted.kept, 0.0)
    norm = weight.double().where(parted.kept, 0.0)
    return replace(
        encoded,
        scheme=scheme,
        outliers=parted.words,
        squared_error=encoded.squared_error + float(error.square_().sum()),
        squared_norm=encoded.squared_norm + float(norm.square_().sum()),
    )


def _beside_tables(encoded: Encoded, parted: Parted, weight: torch.Tensor, scheme: Scheme) -> tuple[Encoded, Parted]:
    """Return codes and outliers where rows have tables, in which there is no zero.

    An outlier there is the weight less the number nearest to it, rounded to 16 bits; `values` are both together.

    Raises:
        ScaleError: what is left of a weight is beyond the dtype's largest number.
    """
    assert scheme.outliers is not None
    columns, table = outlier_columns(parted.words), encoded.scales()
    wanted = weight.gather(1, columns).float()
    codes = nearest_codes(wanted, table)
    numbers = table.gather(1, codes)
    left = (wanted - numbers).to(FLOAT_DTYPES[scheme.outliers.dtype])
    _check_outliers(left, scheme.outliers)
    values = torch.zeros_like(parted.values).scatter_(1, columns, left.float() + numbers)
    chosen = encoded.codes.scatter(1, columns, codes.to(torch.uint8))
    return replace(encoded, codes=chosen), replace(parted, words=outlier_words(columns, left), values=values)


def quantize_beside(
    weight: torch.Tensor, scheme: Scheme, quantize: Callable[[torch.Tensor, Scheme, torch.Tensor], Encoded]
) -> Encoded:
    """Keep the largest weights of every row, and have codes chosen for the others.

    Args:
        weight: as for `part`.
        scheme: one with outliers.
        quantize: chooses codes for the weights that a mask, bool [OC, IC], has: the others are zero.

    Raises:
        As `part` and `quantize` do.
    """
    assert scheme.outliers is not None
    parted = part(weight, scheme.outliers)
    return beside(quantize(parted.rest, scheme.dense, ~parted.kept), parted, weight, scheme)
