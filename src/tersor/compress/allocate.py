"""Which feature gets which level? The least loss for a budget of true bytes, over all linears of a model at once.

Every output feature has a loss at each level, in one unit for the whole model (`salience`). Of each feature only the
levels on the lower convex hull of (bytes, loss) can be worth their bytes. A move goes from one of them to the next; all
moves of all features are made in the order of loss saved a byte until the budget is spent. That is the optimum for the
bytes which are spent (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Trans.
ASSP 36(9), 1988).

A kernel computes whole units of rows, and linears of the same input as one weight. So the choice is made twice: feature
by feature, which says where along its hull every feature stands when the budget is spent, and then for blocks of
features that stand close together, each as many rows as a unit has. What that loses against a free choice is the price
of pairs and units, and is part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tersor.compress.allocation import (
    Allocation,
    Bytes,
    Chosen,
    Floats,
    Fused,
    check_budget,
    check_losses,
    row_bytes,
    summed,
)
from tersor.errors import InputError
from tersor.formats import Scheme


def allocate(layers: Sequence[Fused], levels: Sequence[Scheme], budget: int, unit: int = 64) -> Allocation:
    """Give every output feature a level, for the least loss within a budget.

    Args:
        layers: every module of the model that is to be compressed, once.
        levels: what a feature may get.
        budget: bytes of all weights, counted as in `Allocation.nbytes`.
        unit: rows that a kernel computes at a time, which have one level.

    Raises:
        InputError: the budget is below what the smallest levels take, or above what the largest do; the line says
            what is feasible.
        FormatError: a group size does not divide the input channels of a layer.
        ShapeError: losses of the wrong shape.
    """
    for layer in layers:
        check_losses(layer, len(levels))
    check_budget(layers, levels, budget, unit)
    rows = [row_bytes(levels, layer.ic) * layer.copies for layer in layers]
    each = list(zip(layers, rows, strict=True))
    free = [Blocks(replace(layer, paired=False), row, layer.index_bytes) for layer, row in each]
    pairs = spend([Blocks(layer, row, layer.index_bytes) for layer, row in each], budget)
    free_loss = spend(free, budget).loss
    blocks = [Blocks(layer, row, layer.index_bytes, unit, pairs.price) for layer, row in each]
    chosen: dict[str, Chosen] = {}
    for one, own in zip(blocks, spend(blocks, budget).chosen, strict=True):
        chosen |= one.spread(own)
    return summed(layers, levels, chosen, unit, free_loss, pairs.loss)


def allocate_by_count(
    layers: Sequence[Fused], levels: Sequence[Scheme], shares: Sequence[float], unit: int = 64
) -> Allocation:
    """Give the features that lose most at the first level the last one, and so on, by counts: MixLLM's rule.

    Features are counted, not bytes, whatever a row of each takes (arXiv 2412.14590v2, algorithm 1).

    Args:
        layers: every module of the model; `paired` ones are chosen apart, as by the paper.
        levels: what a feature may get, from the coarsest to the finest.
        shares: which part of all features gets each level; they add up to 1.
        unit: rows that a kernel computes at a time, for the padding.

    Raises:
        InputError: shares that are none, or not one a level.
        ShapeError: losses of the wrong shape.
    """
    check_shares(shares, len(levels))
    for layer in layers:
        check_losses(layer, len(levels))
    names = [name for layer in layers for name in layer.losses]
    scores = np.concatenate([loss[0] for layer in layers for loss in layer.losses.values()])
    order = np.argsort(-scores, kind="stable")
    pooled = np.zeros(len(scores), dtype=np.uint8)
    first = 0
    for level in range(len(levels) - 1, 0, -1):
        last = first + int(len(scores) * shares[level] + 1e-6)
        pooled[order[first:last]] = level
        first = last
    sizes = [loss.shape[1] for layer in layers for loss in layer.losses.values()]
    chosen = dict(zip(names, np.split(pooled, np.cumsum(sizes)[:-1]), strict=True))
    found = summed(layers, levels, chosen, unit, 0.0, 0.0)
    return replace(found, free_loss=found.loss, pairs_loss=found.loss)


def check_shares(shares: Sequence[float], levels: int) -> None:
    """Hold that shares are parts of all features, one a level.

    Raises:
        InputError: they are not.
    """
    if len(shares) != levels or not min(shares) >= 0 or not abs(sum(shares) - 1) <= 1e-6:
        raise InputError(f"shares {list(shares)} of {levels} levels: give one a level, which add up to 1")


class Blocks:
    """The features of one layer in blocks that have one level each.

    Attributes:
        nbytes: of every block at every level [levels, blocks], without what says the level.
        losses: likewise.
        fixed: bytes that say the levels.
    """

    def __init__(self, layer: Fused, row: Bytes, fixed: int, unit: int = 1, price: float = 0.0) -> None:
        """Put features together that stand close together where a byte costs `price`.

        Args:
            layer: the modules.
            row: bytes of a row at each level, in all copies; any other count of what is spent serves as well.
            fixed: bytes of the layer whatever is chosen.
            unit: rows of a block; the first may have fewer, and counts as whole.
            price: loss that a byte costs at the budget.
        """
        self._layer = layer
        losses = list(layer.losses.values())
        features = np.sum(losses, axis=0) if layer.paired else np.concatenate(losses, axis=1)
        rows = len(losses) if layer.paired else 1
        size = max(1, unit // rows)
        count = features.shape[1]
        if size == 1:
            self._order = np.arange(count)
            starts = self._order
            self.losses = features
        else:
            self._order = np.argsort(_place(features, row * rows, price), kind="stable")
            starts = np.concatenate(([0], np.arange(count % size or size, count, size)))
            self.losses = np.add.reduceat(features[:, self._order], starts, axis=1)
        self._lengths = np.diff(np.append(starts, count))
        self.nbytes = np.repeat((row * rows * size)[:, None], len(starts), axis=1)
        self.fixed, self._rows = fixed, rows

    def loss(self, chosen: Chosen) -> float:
        """Return the loss of the blocks at their levels."""
        return float(np.take_along_axis(self.losses, chosen[None].astype(np.intp), axis=0).sum())

    def rows(self, chosen: Chosen) -> list[int]:
        """Return how many rows of one copy have each level, of the level of every block."""
        counts = np.bincount(chosen, weights=self._lengths, minlength=len(self.losses))
        return [int(count) * self._rows for count in counts]

    def spread(self, chosen: Chosen) -> dict[str, Chosen]:
        """Return module -> the level of every feature, of the level of every block."""
        features = np.empty(len(self._order), dtype=np.uint8)
        features[self._order] = np.repeat(chosen, self._lengths)
        if self._layer.paired:
            return {name: features.copy() for name in self._layer.losses}
        ends = np.cumsum([loss.shape[1] for loss in self._layer.losses.values()])
        return dict(zip(self._layer.losses, np.split(features, ends[:-1]), strict=True))


@dataclass(frozen=True, slots=True)
class _Moves:
    """Steps along the hulls of blocks, those of one block in order.

    Attributes:
        block: which block.
        level: where the step leads.
        extra: bytes that it takes.
        slope: loss saved a byte; it falls along a hull.
    """

    block: NDArray[np.int64]
    level: Chosen
    extra: Bytes
    slope: Floats


def _hulls(losses: Floats, nbytes: Bytes) -> tuple[Chosen, list[_Moves]]:
    """Return where every block begins, its smallest level, and its steps along the hull: the n-th ones together.

    Args:
        losses, nbytes: [levels, blocks].
    """
    levels, count = losses.shape
    least = nbytes == nbytes.min(axis=0)
    current = np.where(least, losses, np.inf).argmin(axis=0)
    blocks, last = np.arange(count), np.full(count, np.inf)
    begin, steps = current.astype(np.uint8), []
    for _ in range(levels - 1):
        at = current[blocks]
        more = nbytes[:, blocks] - nbytes[at, blocks]
        saved = losses[at, blocks] - losses[:, blocks]
        slope = np.where(more > 0, saved / np.maximum(more, 1), -np.inf)
        best = levels - 1 - slope[::-1].argmax(axis=0)
        picked = np.arange(len(blocks))
        useful = slope[best, picked] > 0
        blocks, best, picked = blocks[useful], best[useful], picked[useful]
        if not len(blocks):
            break
        last[blocks] = np.minimum(last[blocks], slope[best, picked])
        steps.append(_Moves(blocks, best.astype(np.uint8), more[best, picked], last[blocks]))
        current[blocks] = best
    return begin, steps


@dataclass(frozen=True, slots=True)
class Spent:
    """What a budget buys.

    Attributes:
        chosen: the levels of the blocks of every layer.
        loss: of all of them.
        price: loss that a byte costs where the budget is spent.
    """

    chosen: list[Chosen]
    loss: float
    price: float


def spend(layers: Sequence[Blocks], budget: int) -> Spent:
    """Choose the levels of the blocks of all layers."""
    begins, parts, offset, spent = [], [], 0, 0
    for blocks in layers:
        begin, steps = _hulls(blocks.losses, blocks.nbytes)
        spent += int(np.take_along_axis(blocks.nbytes, begin[None].astype(np.intp), axis=0).sum()) + blocks.fixed
        begins.append(begin)
        parts += [_Moves(step.block + offset, step.level, step.extra, step.slope) for step in steps]
        offset += len(begin)
    chosen = np.concatenate(begins)
    price = 0.0
    if parts:
        # Steps of one block never rise in slope and stand in order, so a stable sort keeps that order.
        slope = np.concatenate([part.slope for part in parts])
        order = np.argsort(-slope, kind="stable")
        block = np.concatenate([part.block for part in parts])[order]
        level = np.concatenate([part.level for part in parts])[order]
        extra = np.concatenate([part.extra for part in parts])[order]
        total = spent + np.cumsum(extra)
        made = int(np.searchsorted(total, budget, side="right"))
        chosen[block[:made]] = level[:made]
        if made < len(order):
            price = float(slope[order[made]])
            left = budget - (int(total[made - 1]) if made else spent)
            _fill(chosen, block[made:], level[made:], extra[made:], left)
    split = np.split(chosen, np.cumsum([len(begin) for begin in begins])[:-1])
    return Spent(split, sum(blocks.loss(own) for blocks, own in zip(layers, split, strict=True)), price)


def _fill(chosen: Chosen, block: NDArray[np.int64], level: Chosen, extra: Bytes, left: int) -> None:
    """Spend what the next move is too large for on later moves, of blocks that no move was skipped of."""
    smallest, skipped = int(extra.min()), set()
    for one, where, cost in zip(block.tolist(), level.tolist(), extra.tolist(), strict=True):
        if left < smallest:
            return
        if cost > left or one in skipped:
            skipped.add(one)
            continue
        chosen[one] = where
        left -= cost


def _place(features: Floats, nbytes: Bytes, price: float) -> Floats:
    """Return where every feature stands if a byte costs `price`: the rank of its level, and how near the next one is.

    Args:
        features: losses [levels, features].
        nbytes: of a feature at every level [levels].
        price: loss that a byte costs.
    """
    tiny = np.finfo(np.float64).tiny
    level, steps = _hulls(features, np.repeat(nbytes[:, None], features.shape[1], axis=1))
    above, below = np.full(len(level), np.nan), np.full(len(level), np.nan)  # slopes of the last step and of the next
    for step in steps:
        reached = step.slope >= max(price, tiny)
        level[step.block[reached]] = step.level[reached]
        above[step.block[reached]] = step.slope[reached]
        waiting = step.block[~reached]
        below[waiting] = np.fmax(below[waiting], step.slope[~reached])
    behind = np.nan_to_num(np.log(above) - np.log(max(price, tiny)), nan=1.0)  # 1 where a hull begins, or ends
    ahead = np.nan_to_num(np.log(max(price, tiny)) - np.log(below), nan=1.0)
    rank = np.argsort(np.argsort(nbytes, kind="stable"))
    place: Floats = rank[level] + 0.999 * behind / np.maximum(behind + ahead, tiny)
    return place
