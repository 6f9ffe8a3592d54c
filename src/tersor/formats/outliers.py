"""Which weights of a row are kept as they are beside the codes of the others, and how is each of them written?

The form of SqueezeLLM (arXiv 2306.07629): a dense part of few bits, and a sparse one of a few weights of 16 bits.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from tersor.errors import FormatError
from tersor.formats.dtypes import FLOAT_DTYPES

MOST_PERCENT = 10.0
"""So many outliers take as many bytes as three more bits of every weight would."""
MOST_COLUMNS = 1 << 16
"""Input channels that the 16 bits of an outlier's column count."""
DTYPES = ("float16", "bfloat16")
"""What an outlier may be: the upper half of its word."""

_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%")


@dataclass(frozen=True, slots=True)
class Outliers:
    """A share of the weights of every row that is kept in 16 bits, each in a word with its column.

    The dense part has the code there that decodes to zero.

    Attributes:
        percent: of the weights of a row.
        dtype: of the weights kept, a key of `DTYPES`.
    """

    percent: float
    dtype: str

    def __post_init__(self) -> None:
        if not 0 < self.percent <= MOST_PERCENT:
            raise FormatError(
                f"outliers of {self.percent:g} % are not more than 0 and at most {MOST_PERCENT:g} %: each takes 32 "
                "bits, and beyond that a format of more bits is smaller"
            )
        if self.dtype not in DTYPES:
            raise FormatError(f"outliers are {' or '.join(DTYPES)}, not {self.dtype!r}")

    @staticmethod
    def parse(text: str, dtype: str) -> Outliers:
        """Return what a user means by a text such as `0.5%`.

        Raises:
            FormatError: it is no share, or one out of reach.
        """
        match = _PERCENT.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise FormatError(f"outliers {text!r} are not a share of the weights such as '0.5%'")
        return Outliers(float(match[1]), dtype)

    def per_row(self, ic: int) -> int:
        """Return how many weights of a row of `ic` are kept: the share rounded to nearest, at least one.

        Raises:
            FormatError: a row is longer than a column's number counts.
        """
        if ic > MOST_COLUMNS:
            raise FormatError(f"outliers have 16 bits for their column, and rows have {ic} input channels")
        return min(ic, max(1, math.floor(ic * self.percent / 100 + 0.5)))

    def key(self) -> str:
        """Return a short text that names them exactly, such as `0.5%:bfloat16`."""
        return f"{self.percent:.10g}%:{self.dtype}"

    @staticmethod
    def from_key(share: str, dtype: str) -> Outliers:
        """Return what `key()` named, its two parts apart."""
        return Outliers(float(share.removesuffix("%")), dtype)


def outlier_words(columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return outliers as they are stored, int32: the column in the lower 16 bits, the weight in the upper.

    Args:
        columns: integers of any width, any shape, below `MOST_COLUMNS`.
        values: of that shape, float16 or bfloat16.
    """
    bits = values.view(torch.int16).to(torch.int32) << 16
    return bits | columns.to(torch.int32)


def outlier_columns(words: torch.Tensor) -> torch.Tensor:
    """Return the columns of stored outliers, int64 of the same shape."""
    return (words & (MOST_COLUMNS - 1)).to(torch.int64)


def outlier_values(words: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return the weights of stored outliers, of the same shape in `dtype`."""
    return (words >> 16).to(torch.int16).view(FLOAT_DTYPES[dtype])


def cut_outliers(words: torch.Tensor, columns: tuple[int, int]) -> torch.Tensor:
    """Return the outliers of some input channels, [OC, K'], with columns counted from the first of these.

    K' is what the row has that has most of them, at least 1; others end with zeros, which are at column 0.

    Args:
        words: int32 [OC, K].
        columns: the first channel, and the one after the last.
    """
    first, last = columns
    found = outlier_columns(words)
    inside = (found >= first) & (found < last)
    most = max(1, int(inside.sum(dim=1).max())) if words.numel() else 1
    order = torch.argsort((~inside).to(torch.uint8), dim=1, stable=True)[:, :most]
    moved = (words - first).where(inside, 0)  # columns fill the lower bits, and none of them falls below 0
    left = moved.gather(1, order)
    return left if left.shape[1] == most else torch.nn.functional.pad(left, (0, most - left.shape[1]))


def add_outliers(weight: torch.Tensor, words: torch.Tensor, dtype: str) -> torch.Tensor:
    """Add stored outliers [OC, K] to a weight [OC, IC], in place; where they stand it is zero. Return it."""
    return weight.scatter_add_(1, outlier_columns(words), outlier_values(words, dtype).to(weight.dtype))
