"""Which weights of every row are kept beside the codes, and what is left for those? SqueezeLLM's form.

With statistics of the layer those weights are kept that the codes would err most on, by the loss of the layer's outputs
to second order: (w - q)^2 times the mean square of the channel's inputs, q the nearest value with searched scales
(arXiv 2306.07629 has the square of the gradient in its place). Without, the largest. Every row keeps the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tersor.compress.grid import Grid
from tersor.errors import NonFiniteError
from tersor.formats import FLOAT_DTYPES, Encoded, Outliers, ScaleError, Scheme, outlier_words


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


def part(weight: torch.Tensor, outliers: Outliers, sensitivity: torch.Tensor | None = None) -> Parted:
    """Take the outliers out of rows of a weight.

    Args:
        weight: [OC, IC], float16, bfloat16 or float32, any device.
        outliers: how many of each row, and in which dtype.
        sensitivity: float32 [OC, IC], not negative: what is lost where a weight is not kept; its magnitude by default.

    Raises:
        NonFiniteError: the weight holds a NaN or an infinity, with its index.
        FormatError: rows are longer than columns are counted.
        ScaleError: an outlier is beyond the largest number of its dtype.
    """
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        row, column = (int(axis) for axis in (~finite).nonzero()[0])
        raise NonFiniteError((row, column), float(weight[row, column]))
    score = weight.float().abs() if sensitivity is None else sensitivity
    columns = score.topk(outliers.per_row(weight.shape[1]), dim=1).indices.sort(dim=1).values
    values = weight.gather(1, columns).to(FLOAT_DTYPES[outliers.dtype])
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).nonzero()[0][0])
        raise ScaleError(row, f"an outlier in row {{row}} is beyond {outliers.dtype}'s largest number: keep none there")
    kept = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, columns, True)
    plain = torch.zeros(weight.shape, device=weight.device).scatter_(1, columns, values.float())
    return Parted(outlier_words(columns, values), kept, weight.masked_fill(kept, 0), plain)


def sensitivity(rows: torch.Tensor, grid: Grid, energy: torch.Tensor) -> torch.Tensor:
    """Return what the layer's outputs lose by every weight on its nearest code, float32 [OC, IC].

    Args:
        rows: float32 [OC, IC].
        grid: of the dense part.
        energy: float32 [IC], the mean square of every channel's inputs.
    """
    scale, zero_point = (part.unsqueeze(2) for part in grid.search(rows, energy))
    wanted = (rows.view(len(rows), grid.groups, -1) / torch.where(scale > 0, scale, 1.0)).contiguous()
    low, high = grid.ends(zero_point)
    nearest = grid.nearest(wanted.clone(), low, high, torch.empty_like(wanted)) * scale
    return (nearest.view_as(rows) - rows).square_() * energy


def beside(encoded: Encoded, parted: Parted, weight: torch.Tensor, scheme: Scheme) -> Encoded:
    """Return codes of what is left with the outliers beside them, and the errors of both against the weight."""
    error = parted.values.double() - weight.double().where(parted.kept, 0.0)
    norm = weight.double().where(parted.kept, 0.0)
    return replace(
        encoded,
        scheme=scheme,
        outliers=parted.words,
        squared_error=encoded.squared_error + float(error.square_().sum()),
        squared_norm=encoded.squared_norm + float(norm.square_().sum()),
    )


def quantize_beside(
    weight: torch.Tensor, scheme: Scheme, quantize: Callable[[torch.Tensor, Scheme], Encoded]
) -> Encoded:
    """Keep the largest weights of every row, and have codes chosen for the others.

    Args:
        weight: as for `part`.
        scheme: one with outliers.
        quantize: chooses codes; what is zero stays zero.

    Raises:
        As `part` and `quantize` do.
    """
    assert scheme.outliers is not None
    parted = part(weight, scheme.outliers)
    return beside(quantize(parted.rest, scheme.dense), parted, weight, scheme)
