"""A weight as codes and scales, before anything is packed, and what numbers they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tersor.formats.outliers import add_outliers
from tersor.formats.scheme import Scheme, scale_values


@dataclass(frozen=True, slots=True)
class Objective:
    """The loss of a layer's outputs over the tokens of a calibration, which a recipe makes small.

    Attributes:
        before: of weights rounded to nearest.
        after: of the codes chosen; the unit is the recipe's own, the same in both.
    """

    before: float
    after: float

    @staticmethod
    def sum(blocks: Iterable[Objective]) -> Objective:
        """Return the loss of a weight whose blocks of rows were encoded one by one."""
        parts = list(blocks)
        return Objective(math.fsum(part.before for part in parts), math.fsum(part.after for part in parts))


@dataclass(frozen=True, slots=True)
class Encoded:
    """A weight [OC, IC] as codes and scales.

    Attributes:
        scheme: what codes and scales mean.
        codes: uint8 [OC, IC].
        scale: [OC, G] in the scheme's scale dtype; of `lut` formats the tables, each from the least number up.
        zero_point: uint8 [OC, G] for `uint` formats, else `None`.
        squared_error: sum over all weights w of (w - dequantised w)^2.
        squared_norm: sum over all weights w of w^2.
        underflowed: rows with weights so small that no scale of the dtype is near the one they need, so that they
            decode to zero or to values far off.
        objective: what a recipe with statistics of the layer has made small; `None` of others.
        outliers: int32 [OC, K], the weights that are kept beside the codes, where the scheme has some
            (`outliers.outlier_words`).
    """

    scheme: Scheme
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    squared_error: float
    squared_norm: float
    underflowed: tuple[int, ...] = ()
    objective: Objective | None = None
    outliers: torch.Tensor | None = None

    def scales(self) -> torch.Tensor:
        """Return the scales as numbers, float32 [OC, G]."""
        return scale_values(self.scale, self.scheme)

    def dequantize(self) -> torch.Tensor:
        """Return the weights that codes and scales stand for, float32 [OC, IC]."""
        weight = dequantize(self.codes, self.scale, self.zero_point, self.scheme)
        if self.outliers is None or self.scheme.outliers is None:
            return weight
        return add_outliers(weight, self.outliers, self.scheme.outliers.dtype)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    """Return float32 weights: scale * (decode(code) - zero point), or the scale that a code says.

    Args:
        codes: uint8 [rows, IC].
        scale: [rows, G] in the scheme's scale dtype.
        zero_point: uint8 [rows, G], or `None` where the format has none.
        scheme: what codes and scales mean.

    Returns:
        float32 [rows, IC].
    """
    rows, ic = codes.shape
    if scheme.has_table:
        return scale_values(scale, scheme).gather(1, codes.to(torch.int64))
    values = scheme.format.decode(codes).view(rows, scheme.groups(ic), -1)
    if zero_point is not None:
        values.sub_(zero_point.unsqueeze(2))
    return values.mul_(scale_values(scale, scheme).unsqueeze(2)).view(rows, ic)
