"""Which feature gets which level? The least loss for a budget of time, over all linears of a model at once.

As for bytes (`allocate`), with what a row of each level takes in seconds. Seconds differ in one way: every level that a
layer has takes something of its own, a launch or a share of one. So a layer gets a level only where what its features
save by it is worth that, too. A price of a second is looked for by bisection at which the whole model, as it is
predicted with all row counts known, just fits the budget (a Lagrangian: Everett, "Generalized Lagrange multiplier
method", Operations Research 11(3), 1963).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from tersor.compress.allocate import Blocks, spend
from tersor.compress.allocation import Allocation, Bytes, Chosen, Floats, Fused, check_losses, inward, summed
from tersor.errors import InputError
from tersor.formats import Scheme

_TICKS = 1e15
"""Of a second: what rows take is counted in whole ones, as bytes are."""
_HALVINGS = 60


class Clock(Protocol):
    """Predicts what products take: the cost model of whoever runs them.

    Attributes:
        words: of what, such as `a step of 8 rows on NVIDIA H200`.
    """

    words: str

    def layer(self, layer: Fused, rows: Sequence[int]) -> float:
        """Return the seconds of the products of one layer with so many rows of each level, of one copy."""

    def total(self, layers: Sequence[Fused], rows: Sequence[Sequence[int]]) -> float:
        """Return the seconds of all layers."""


def allocate_time(
    layers: Sequence[Fused], levels: Sequence[Scheme], clock: Clock, budget: float, unit: int = 64
) -> Allocation:
    """Give every output feature a level, for the least loss within a budget of predicted time.

    Args:
        layers: every module of the model that is to be compressed, once.
        levels: what a feature may get.
        clock: predicts what the layers take.
        budget: seconds of all of them.
        unit: rows that a kernel computes at a time, which have one level.

    Raises:
        InputError: the budget is below what the fastest levels take, or above what the slowest do; the line says what
            is feasible.
        ShapeError: losses of the wrong shape.
    """
    for layer in layers:
        check_losses(layer, len(levels))
    check_time(layers, levels, clock, budget)
    costs = [_Costs.of(layer, len(levels), clock) for layer in layers]
    ticks = round(budget * _TICKS)
    free = [Blocks(replace(layer, paired=False), own.row, fixed=0) for layer, own in zip(layers, costs, strict=True)]
    pairs = [Blocks(layer, own.row, fixed=0) for layer, own in zip(layers, costs, strict=True)]
    free_loss, by_pairs = spend(free, ticks).loss, spend(pairs, ticks)
    blocks = [Blocks(layer, own.row, 0, unit, by_pairs.price) for layer, own in zip(layers, costs, strict=True)]

    def at(price: float) -> tuple[list[Chosen], float]:
        chosen = [_cheapest(one, price, own.further) for one, own in zip(blocks, costs, strict=True)]
        return chosen, clock.total(layers, [one.rows(own) for one, own in zip(blocks, chosen, strict=True)])

    chosen, seconds = _fitting(at, budget, max(by_pairs.price * _TICKS, np.finfo(np.float64).tiny))
    spread: dict[str, Chosen] = {}
    for one, own in zip(blocks, chosen, strict=True):
        spread |= one.spread(own)
    return replace(summed(layers, levels, spread, unit, free_loss, by_pairs.loss), seconds=seconds)


def check_time(layers: Sequence[Fused], levels: Sequence[Scheme], clock: Clock, budget: float) -> None:
    """Hold that a budget of seconds is feasible; of the losses only the number of features matters.

    Raises:
        InputError: it is below what the fastest levels take, or above what the slowest do; the line says the range.
    """
    fastest, slowest = feasible_time(layers, levels, clock)
    if not fastest <= budget <= slowest:
        side = "below what the fastest levels take" if budget < fastest else "above what the slowest levels take"
        raise InputError(
            f"a latency of {1e3 * budget:.4g} ms is {side}: feasible are {inward(1e3 * fastest, True)} to "
            f"{inward(1e3 * slowest, False)} ms, predicted for the linears of {clock.words}"
        )


def feasible_time(layers: Sequence[Fused], levels: Sequence[Scheme], clock: Clock) -> tuple[float, float]:
    """Return the seconds of all layers where each has its fastest level, and where each has its slowest."""
    fastest, slowest = [], []
    for layer in layers:
        uniform = [_uniform(layer.rows, level, len(levels)) for level in range(len(levels))]
        order = np.argsort([clock.layer(layer, own) for own in uniform], kind="stable").tolist()
        fastest.append(uniform[order[0]])
        slowest.append(uniform[order[-1]])
    return clock.total(layers, fastest), clock.total(layers, slowest)


def _uniform(rows: int, level: int, levels: int) -> list[int]:
    """Return so many rows of one level, and none of the others."""
    return [rows if number == level else 0 for number in range(levels)]


@dataclass(frozen=True, slots=True)
class _Costs:
    """What the rows of a layer take.

    Attributes:
        row: ticks of a row of one copy at each level, those of all copies counted.
        further: seconds of every level beyond the first.
    """

    row: Bytes
    further: float

    @staticmethod
    def of(layer: Fused, levels: int, clock: Clock) -> _Costs:
        """Ask a clock: a row takes its share of the whole layer; half of the rows at one level and half at another take
        more than the mean of both by what a further level takes."""
        whole = [clock.layer(layer, _uniform(layer.rows, level, levels)) for level in range(levels)]
        row = np.array([max(1, round(one / layer.rows * _TICKS)) for one in whole], dtype=np.int64)
        low, high = int(np.argmin(whole)), int(np.argmax(whole))
        if low == high or layer.rows < 2:
            return _Costs(row, 0.0)
        half = layer.rows // 2
        parted = [half * (number == low) + (layer.rows - half) * (number == high) for number in range(levels)]
        return _Costs(row, max(0.0, clock.layer(layer, parted) - (whole[low] + whole[high]) / 2))


def _cheapest(blocks: Blocks, price: float, further: float) -> Chosen:
    """Choose the levels of a layer's blocks where a second costs `price`, those that are not worth it left out.

    Args:
        blocks: of the layer, `nbytes` in ticks.
        price: loss that a second costs.
        further: seconds of every level beyond the first.
    """
    owed: Floats = blocks.losses + price / _TICKS * blocks.nbytes
    kept = list(range(len(owed)))
    best = float(owed.min(axis=0).sum()) + price * further * (len(kept) - 1)
    while len(kept) > 1:
        trials = [[level for level in kept if level != without] for without in kept]
        sums = [float(owed[trial].min(axis=0).sum()) + price * further * (len(trial) - 1) for trial in trials]
        least = int(np.argmin(sums))
        if sums[least] > best:
            break
        best, kept = sums[least], trials[least]
    return np.array(kept, dtype=np.uint8)[owed[kept].argmin(axis=0)]


class _At(Protocol):
    def __call__(self, price: float) -> tuple[list[Chosen], float]: ...


def _fitting(at: _At, budget: float, price: float) -> tuple[list[Chosen], float]:
    """Return what is chosen, and its seconds, at the least price of a second at which it fits a budget.

    Args:
        at: what is chosen at a price.
        budget: seconds.
        price: where to begin.
    """
    chosen, seconds = at(0.0)
    if seconds <= budget:
        return chosen, seconds
    low, high = 0.0, price
    best = at(high)
    while best[1] > budget:
        if not math.isfinite(high * 4):
            raise InputError("no levels take so little time together: leave a level out, or give more time")
        low, high = high, high * 4
        best = at(high)
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high) if low else high / 16
        if not low < middle < high or (low and high / low < 1 + 1e-9):
            break
        found = at(middle)
        if found[1] <= budget:
            high, best = middle, found
        else:
            low = middle
    return best
