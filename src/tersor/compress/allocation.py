"""What is chosen where output features get levels, and what does it take? Sizes and losses of a whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tersor.errors import InputError, ShapeError
from tersor.formats import Scheme

Floats = NDArray[np.float64]
Bytes = NDArray[np.int64]
Chosen = NDArray[np.uint8]
"""The level of each output feature [OC]: an index into the levels."""

INDEX_BYTES = 1
"""Bytes that say which level a feature has, in a checkpoint."""


@dataclass(frozen=True, slots=True)
class Fused:
    """Modules that a kernel multiplies as one weight: one alone, q/k/v, or gate and up.

    Attributes:
        losses: module -> its loss at every level, [levels, OC].
        ic: input channels of every module.
        paired: whether row i of all modules has one level, as that of gate and up: they become one number in the
            kernel.
        copies: how many weights share the levels, each computed alone: those of the experts of a layer, whose losses
            are summed up.
        stored: in how many places a checkpoint says the levels: once, or for every expert.
        experts: of experts, what holds all weights of them; else an empty string.
        second: of experts, whether they write with these weights: gate and up come first.
    """

    losses: Mapping[str, Floats]
    ic: int
    paired: bool = False
    copies: int = 1
    stored: int = 1
    experts: str = ""
    second: bool = False

    @property
    def rows(self) -> int:
        """Output features of all modules, those of one copy."""
        return sum(loss.shape[1] for loss in self.losses.values())

    @property
    def weights(self) -> int:
        """How many weights there are in all copies."""
        return self.rows * self.ic * self.copies

    @property
    def index_bytes(self) -> int:
        """Bytes that say the levels."""
        return self.rows * self.stored * INDEX_BYTES


@dataclass(frozen=True, slots=True)
class Allocation:
    """What every feature gets.

    Attributes:
        chosen: module -> level of each output feature.
        nbytes: bytes of all weights: codes, scales, zero points, what says the level of a feature, and rows that fill
            units up.
        padding: those of `nbytes` which fill units up.
        weights: how many weights there are.
        loss: sum of the losses of all features at their levels.
        free_loss: what the same budget would lose if every feature of every module might have any level.
        pairs_loss: what it would lose if pairs had one level, and units were single rows.
        seconds: what all of it is predicted to take, where the budget was one of time; else `None`.
    """

    chosen: dict[str, Chosen]
    nbytes: int
    padding: int
    weights: int
    loss: float
    free_loss: float
    pairs_loss: float
    seconds: float | None = None

    @property
    def bits(self) -> float:
        """True bits a weight."""
        return 8 * self.nbytes / self.weights


def check_budget(
    layers: Sequence[Fused], levels: Sequence[Scheme], budget: int, unit: int = 64, beside: int = 0
) -> None:
    """Hold that a budget is feasible; of the losses only the number of features matters.

    `beside` is how many bytes the sizes in the line count beside these weights.

    Raises:
        InputError: it is below what the smallest levels take, or above what the largest do; the line says the range.
        FormatError: a group size does not divide the input channels of a layer.
    """
    smallest, largest = feasible(layers, levels, unit)
    if not smallest <= budget <= largest:
        weights = sum(layer.weights for layer in layers)
        side = "below what the smallest levels take" if budget < smallest else "above what the largest levels take"
        bits = f", {8 * budget / weights:.3f} bits a weight, is" if budget > 0 else " is"
        sizes = [inward((limit + beside) / 1e9, up) for limit, up in ((smallest, True), (largest, False))]
        least, most = math.ceil(8000 * smallest / weights) / 1000, math.floor(8000 * largest / weights) / 1000
        raise InputError(
            f"a budget of {(budget + beside) / 1e9:.4g} GB{bits} {side}: feasible are {sizes[0]} to {sizes[1]} GB, "
            f"{least:.3f} to {most:.3f} bits"
        )


def inward(limit: float, up: bool) -> str:
    """Return the four digits of the limit of a range that are within it: rounded up where it begins, else down."""
    step = 10.0 ** (math.floor(math.log10(limit)) - 3)
    return f"{(math.ceil if up else math.floor)(limit / step) * step:.4g}"


def feasible(layers: Sequence[Fused], levels: Sequence[Scheme], unit: int = 64) -> tuple[int, int]:
    """Return the bytes of all weights at the smallest level and at the largest."""
    smallest = largest = 0
    for layer in layers:
        row = row_bytes(levels, layer.ic)
        rows = -(-layer.rows // unit) * unit
        smallest += rows * int(row.min()) * layer.copies + layer.index_bytes
        largest += rows * int(row.max()) * layer.copies + layer.index_bytes
    return smallest, largest


def row_bytes(levels: Sequence[Scheme], ic: int) -> Bytes:
    """Return the bytes of a row of `ic` input channels at each level: codes, scales and zero points."""
    return np.array([round(scheme.bits_per_weight(ic) * ic / 8) for scheme in levels], dtype=np.int64)


def summed(
    layers: Sequence[Fused],
    levels: Sequence[Scheme],
    chosen: dict[str, Chosen],
    unit: int,
    free_loss: float,
    pairs_loss: float,
) -> Allocation:
    """Return levels with what they take and lose."""
    nbytes = padding = weights = 0
    loss = 0.0
    for layer in layers:
        row = row_bytes(levels, layer.ic)
        counts = np.zeros(len(levels), dtype=np.int64)
        for name, own in layer.losses.items():
            counts += np.bincount(chosen[name], minlength=len(levels))
            loss += float(np.take_along_axis(own, chosen[name][None].astype(np.intp), axis=0).sum())
        whole = -(-counts // unit) * unit
        nbytes += int((whole * row).sum()) * layer.copies + layer.index_bytes
        padding += int(((whole - counts) * row).sum()) * layer.copies
        weights += layer.weights
    return Allocation(chosen, nbytes, padding, weights, loss, free_loss, pairs_loss)


def check_losses(layer: Fused, levels: int) -> None:
    """Hold that the losses of a layer are those of its levels."""
    for name, loss in layer.losses.items():
        if loss.ndim != 2 or len(loss) != levels:
            raise ShapeError(f"{name}: losses {list(loss.shape)}, expected [{levels}, OC]")
        if not np.isfinite(loss).all():
            raise InputError(f"{name}: a loss is not finite: the calibration gave NaN or infinite gradients")
    if layer.paired and len({loss.shape[1] for loss in layer.losses.values()}) > 1:
        raise ShapeError(f"{', '.join(layer.losses)}: rows of one level, and not the same number of them")
