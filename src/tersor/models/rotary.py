"""How far do channels of queries and keys turn at a position? Rotary frequencies, their scalings and the tables.

Frequencies and angles are float32, as where the models were trained; cosines and sines of them are exact but for one
rounding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


class Scaling(ABC):
    """A change of the frequencies for texts longer than those of the first training."""

    @abstractmethod
    def scaled(self, frequencies: torch.Tensor, rotary: Rotary, positions: int) -> torch.Tensor:
        """Return the changed frequencies [dim / 2] of `rotary` for texts of up to `positions` tokens."""

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Linear(Scaling):
    """Positions are divided by `factor` (arXiv 2306.15595)."""

    factor: float

    def scaled(self, frequencies: torch.Tensor, rotary: Rotary, positions: int) -> torch.Tensor:
        return frequencies / self.factor


@dataclass(frozen=True, slots=True)
class Llama3(Scaling):
    """Slow channels are divided by `factor`, fast ones kept, those between blended (Llama 3.1, arXiv 2407.21783).

    Attributes:
        factor: of channels that turn less than `low` times in `original` tokens.
        low, high: turns; a channel that makes more than `high` of them is kept.
        original: tokens of the texts of the first training.
    """

    factor: float
    low: float
    high: float
    original: int

    def scaled(self, frequencies: torch.Tensor, rotary: Rotary, positions: int) -> torch.Tensor:
        turns = self.original * frequencies / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True, slots=True)
class Yarn(Scaling):
    """Slow channels are divided by `factor`, with a ramp over channels (YaRN, arXiv 2309.00071).

    Attributes:
        factor: of slow channels.
        fast, slow: turns in `original` tokens between which the ramp lies.
        original: tokens of the texts of the first training.
        truncate: whether the ends of the ramp are whole channels.
        attention: what cosines and sines are multiplied by.
    """

    factor: float
    fast: float
    slow: float
    original: int
    truncate: bool
    attention: float

    def scaled(self, frequencies: torch.Tensor, rotary: Rotary, positions: int) -> torch.Tensor:
        half = rotary.dim // 2
        first, last = (self._channel(turns, rotary) for turns in (self.fast, self.slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary.dim - 1)
        last += 0.001 if first == last else 0
        ramp = ((torch.arange(half, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
        return frequencies / self.factor * ramp + frequencies * (1 - ramp)

    def _channel(self, turns: float, rotary: Rotary) -> float:
        """Return the channel that makes so many turns in `original` tokens."""
        return rotary.dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(rotary.base))

    @property
    def magnitude(self) -> float:
        return self.attention


@dataclass(frozen=True, slots=True)
class LongRope(Scaling):
    """Every channel has a divisor of its own, other ones for long texts (LongRoPE, arXiv 2402.13753; Phi-3).

    Attributes:
        short, long: divisors [dim / 2] for a context of up to `original` tokens, and for a longer one.
        original: tokens of the texts of the first training.
        attention: what cosines and sines are multiplied by.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    attention: float

    def scaled(self, frequencies: torch.Tensor, rotary: Rotary, positions: int) -> torch.Tensor:
        return frequencies / torch.tensor(self.long if positions > self.original else self.short, dtype=torch.float32)

    @property
    def magnitude(self) -> float:
        return self.attention


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotation of queries and keys by position (arXiv 2104.09864).

    Attributes:
        dim: leading channels of a head that turn.
        base: channel i turns by base ** (-2 i / dim) a token.
        scaling: of the frequencies, or `None`.
    """

    dim: int
    base: float
    scaling: Scaling | None = None

    def table(self, positions: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Return cosines, then sines, of every position below `positions`: float32 [positions, dim]."""
        frequencies = 1.0 / self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        magnitude = 1.0
        if self.scaling is not None:
            frequencies, magnitude = self.scaling.scaled(frequencies, self, positions), self.scaling.magnitude
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies).double()
        return (torch.cat((angles.cos(), angles.sin()), dim=1) * magnitude).float().to(device)
