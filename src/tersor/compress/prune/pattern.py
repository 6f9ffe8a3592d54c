"""How many weights of a matrix become zero, and which may stand together: a share, and n of every m as a restriction.

A mask of any algorithm is chosen here, by one score a weight: the larger, the rather it stays. Equal scores stay in the
order of their places, so that a mask is the same on every device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from tersor.errors import InputError

SCOPES = ("layer", "row")
"""Where the share of zeros holds: over a whole matrix, or in every row."""

_BLOCK = re.compile(r"(\d{1,4}):(\d{1,4})")


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which masks are allowed.

    Attributes:
        sparsity: the share of weights that become zero, above 0 and below 1.
        most, of: at most `most` weights stay of every `of` consecutive input channels; 0 is no such restriction.
        scope: one of `SCOPES`.
    """

    sparsity: float
    most: int = 0
    of: int = 0
    scope: str = "layer"

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise InputError(f"scope {self.scope!r} is neither of {', '.join(SCOPES)}")
        share = self.sparsity
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise InputError(f"sparsity {share!r} is not a share of weights between 0 and 1, such as 0.5")
        if not self.of:
            return
        if not 0 < self.most < self.of:
            raise InputError(f"pattern {self.most}:{self.of} does not leave some of every few weights, as 2:4 does")
        least = 1 - self.most / self.of
        if share < least - 1e-9:
            raise InputError(
                f"sparsity {share:g} is out of reach: {self.most}:{self.of} makes {least:g} of the weights zero or more"
            )

    @staticmethod
    def parse(sparsity: Any = None, block: str = "", scope: str = "layer") -> Pattern:
        """Return the pattern that a share and a text such as `2:4` mean.

        Args:
            sparsity: the share of zeros, a number or its text; `None` is what the restriction alone makes.
            block: `n:m`: at most n weights of m consecutive input channels stay; empty is none.
            scope: one of `SCOPES`.

        Raises:
            InputError: they mean none, or the share is out of reach.
        """
        found = _BLOCK.fullmatch(block.strip()) if block else None
        if block and found is None:
            raise InputError(f"pattern {block!r} is not n:m, such as 2:4: n weights of m stay")
        most, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if sparsity is None:
            if not of:
                raise InputError("no sparsity given: say which share of the weights becomes zero, such as 0.5")
            return Pattern(1 - most / of if 0 < most < of else 0.5, most, of, scope)
        try:
            share = float(sparsity)
        except (TypeError, ValueError):
            raise InputError(f"sparsity {sparsity!r} is not a share of weights between 0 and 1, such as 0.5") from None
        return Pattern(share, most, of, scope)

    @property
    def exact(self) -> bool:
        """Whether n of m alone say how many weights stay."""
        return bool(self.of) and abs(self.sparsity - (1 - self.most / self.of)) < 1e-9

    def key(self) -> str:
        """Return the pattern as one word, such as `0.5`, `0.5:row` or `0.6:4:8`."""
        block = f":{self.most}:{self.of}" if self.of else ""
        return f"{self.sparsity:.6g}{block}{':row' if self.scope == 'row' else ''}"

    def check(self, channels: int, name: str) -> None:
        """Check that rows of so many input channels have such masks.

        Raises:
            InputError: the restriction's m does not divide them; the layer is named.
        """
        if self.of and channels % self.of:
            raise InputError(
                f"pattern {self.most}:{self.of} does not divide the {channels} input channels of {name}; give that "
                "layer an override or ignore it"
            )

    def kept(self, rows: int, channels: int) -> int:
        """Return how many weights of a matrix stay."""
        if self.scope == "row":
            return rows * self._stay(channels)
        return self._stay(rows * channels)

    def _stay(self, count: int) -> int:
        return round((1 - self.sparsity) * count)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the mask that keeps the weights of the largest scores.

        Args:
            scores: float [rows, IC], no NaN.

        Returns:
            bool [rows, IC], true where a weight stays.
        """
        rows, channels = scores.shape
        if not self.of:
            return self._largest(scores)
        allowed = first(scores.reshape(-1, self.of), self.most).view(rows, channels)
        return allowed if self.exact else self._largest(torch.where(allowed, scores, -torch.inf))

    def choose_columns(self, scores: torch.Tensor, start: int, channels: int) -> torch.Tensor:
        """Return the mask of some columns, of which all masks together keep as many weights as one of all columns.

        Args:
            scores: float [rows, columns], no NaN, of the columns from `start` on, whole blocks of `of`.
            start: number of the first column.
            channels: IC.

        Returns:
            bool [rows, columns].
        """
        rows, columns = scores.shape
        if self.of:
            allowed = first(scores.reshape(-1, self.of), self.most).view(rows, columns)
            if self.exact:
                return allowed
            scores = torch.where(allowed, scores, -torch.inf)
        if self.scope == "row":
            return first(scores, self._stay(start + columns) - self._stay(start))
        count = self._stay(rows * (start + columns)) - self._stay(rows * start)
        return first(scores.reshape(1, -1), count).view(rows, columns)

    def _largest(self, scores: torch.Tensor) -> torch.Tensor:
        if self.scope == "row":
            return first(scores, self._stay(scores.shape[1]))
        return first(scores.reshape(1, -1), self._stay(scores.numel())).view(scores.shape)


def first(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return where the `count` largest scores of every row are, bool; of equal ones the first.

    Args:
        scores: float [rows, n], no NaN; those that are negative are not among the largest.
        count: at most n.
    """
    width = scores.shape[1]
    if not 0 < count < width:
        return torch.full(scores.shape, count > 0, dtype=torch.bool, device=scores.device)
    least = _least(scores.float(), count)
    above = scores > least
    missing = count - above.sum(dim=1, keepdim=True)
    level = scores == least
    return above | (level & (level.cumsum(dim=1, dtype=torch.int32) <= missing))


def _least(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count`-th largest score of every row, float32 [rows, 1]."""
    if scores.is_cuda and len(scores) == 1:  # where a GPU's selection would have one block of threads for all of them
        return least_by_bits(scores, count)
    return scores.kthvalue(scores.shape[1] - count + 1, dim=1, keepdim=True).values


def least_by_bits(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the `count`-th largest score of every row, float32 [rows, 1], bit by bit.

    The bits of numbers that are not negative are in the order of the numbers.

    Args:
        scores: float32 [rows, n]; those that are negative are not among the largest.
        count: from 1 to n.
    """
    bits = scores.contiguous().view(torch.int32)
    found = torch.zeros(len(scores), 1, dtype=torch.int32, device=scores.device)
    for bit in range(30, -1, -1):
        higher = found | (1 << bit)
        found = torch.where((bits >= higher).sum(dim=1, keepdim=True) >= count, higher, found)
    return found.view(torch.float32)
