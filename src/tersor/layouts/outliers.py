"""Kernel tiles: outliers, in the order in which kernels/cuda/dense/sm90_outliers.cuh reads them.

The outliers of a block of 16 rows by 128 channels fill rounds of 16. As many rounds of every block have a place of
their own and are copied with the block's codes; further ones, of the few blocks that have most, follow behind, so that
any number of outliers may stand in a block.
"""

from __future__ import annotations

import functools
import math

import torch

from tersor.formats import Outliers, outlier_columns, outlier_values
from tersor.formats.dtypes import FLOAT_DTYPES
from tersor.layouts.blocks import BLOCK_IC, BLOCK_OC, UNIT_BLOCKS, UNIT_OC, ic_blocks, oc_blocks

ROUND_WORDS = 16
"""int32 words of a round: for each of four lanes numbers and places of a pair of outliers, and of another pair."""
_ROUND = 16
"""Outliers in a round."""
_MOST_ROUNDS = 8
"""Rounds with a place of their own: as many take the bytes of four bits of every weight."""
_UNITS_BEYOND = 2
"""Units of rows that a tile may have behind the last one, of which it reads that they have no outliers."""
_HALF = BLOCK_IC // 2
_SPREAD = 1.7
"""Standard deviations above the mean for which a block's own rounds have room, as if places were drawn."""


@functools.cache
def rounds_of(kept: Outliers, ic: int) -> int:
    """Return the rounds that every block has a place for where rows of `ic` channels keep a share of their weights."""
    mean = BLOCK_OC * kept.per_row(ic) / max(1, ic_blocks(ic))
    return min(_MOST_ROUNDS, max(1, math.ceil((mean + _SPREAD * math.sqrt(mean)) / _ROUND)))


def arrange(words: torch.Tensor, kept: Outliers, target: str, ic: int) -> torch.Tensor | None:
    """Return stored outliers as kernels for activations of a dtype read them; `None` where it does not have them all.

    Args:
        words: int32 [OC, K], as `formats.outlier_words` makes them.
        kept: what they are.
        target: `float16` or `bfloat16`.
        ic: input channels.

    Returns:
        int32, flat, on the same device: rounds of all blocks, [units, blocks, 4, rounds_of, ROUND_WORDS], and of two
        units more; for every unit, and behind the last one, the number of its first further round, up to whole 16
        bytes; further rounds.
    """
    values = outlier_values(words, kept.dtype)
    bits = values.to(FLOAT_DTYPES[target])
    if words.numel() and not torch.equal(bits.to(torch.float32), values.to(torch.float32)):
        return None
    rounds, blocks = rounds_of(kept, ic), ic_blocks(ic)
    rows = oc_blocks(len(words)) + _UNITS_BEYOND * UNIT_BLOCKS  # blocks of 16 rows
    device, columns = words.device, outlier_columns(words)
    row = torch.arange(len(words), device=device)[:, None].expand_as(words)
    # A block of 16 rows is numbered as its codes lie.
    block = (row // UNIT_OC * blocks + columns // BLOCK_IC) * UNIT_BLOCKS + row % UNIT_OC // BLOCK_OC
    there = bits != 0
    block, columns = block[there], columns[there]
    counts = torch.bincount(block, minlength=rows * blocks)
    needed = (counts + _ROUND - 1) // _ROUND
    further = (needed - rounds).clamp_(min=0)
    first = _before(further)
    slot = _slots(block, columns, needed)
    taken = int(needed.sum()) * _ROUND
    numbers = torch.zeros(taken, dtype=torch.int64, device=device)
    numbers[slot] = bits.view(torch.int16)[there].to(torch.int64) & 0xFFFF
    places = torch.full((taken // 4, 4), -1, device=device)
    places.view(-1)[slot] = _places(row[there], columns)
    # Where nothing stands, a lane reads what another one does.
    places = places.where(places >= 0, places.amax(dim=1, keepdim=True)).clamp_(min=0)
    start, total = rows * blocks * rounds, int(further.sum())
    made = torch.zeros((start + total, ROUND_WORDS // 4, 4), dtype=torch.int64, device=device)
    of_block = torch.repeat_interleave(torch.arange(rows * blocks, device=device), needed)
    turn = torch.arange(len(of_block), device=device) - _before(needed)[of_block]
    index = torch.where(turn < rounds, of_block * rounds + turn, start + first[of_block] + turn - rounds)
    # Lanes have pairs of numbers and of places: of the first and second four outliers, of the third and last.
    pairs = torch.stack((numbers.view(-1, 2, 2, 4), places.view(-1, 2, 2, 4)), dim=2)
    made[index] = (pairs[:, :, :, 0] | pairs[:, :, :, 1] << 16).permute(0, 3, 1, 2).reshape(-1, 4, 4)
    _link(made, needed, further, first, rounds)
    made = made.view(-1)
    made = made.to(torch.int32)
    firsts = torch.nn.functional.pad(first.view(-1, UNIT_BLOCKS * blocks)[:, 0], (0, 1), value=total).to(torch.int32)
    parts = (made[: start * ROUND_WORDS], torch.nn.functional.pad(firsts, (0, -len(firsts) % 4)))
    return torch.cat((*parts, made[start * ROUND_WORDS :]))


def _places(row: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return what says where in its block each outlier stands, as the kernel reads it."""
    channel, half, row = columns % _HALF, columns % BLOCK_IC // _HALF, row % BLOCK_OC
    return channel << 1 | (row & 7) << 7 | half * 0xF << 10 | row >> 3 << 14


def _slots(blocks: torch.Tensor, columns: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """Return which of the places of all rounds, one block's behind the other's, each outlier gets.

    Four lanes read the activations of four neighbours at a time, each for eight tokens: from other banks where the
    pairs of channels have other places in 16 bytes. So four neighbours have each such place once, as far as they go
    round; what a block has more of one gets what is left.

    Args:
        blocks, columns: of each outlier.
        needed: of each block, how many rounds its outliers fill.
    """
    kind = columns % 8 // 2
    kinds, order = (blocks * 4 + kind).sort(stable=True)
    _, index, counts = torch.unique_consecutive(kinds, return_inverse=True, return_counts=True)
    rank = torch.empty_like(blocks)
    rank[order] = torch.arange(len(order), device=blocks.device) - _before(counts)[index]
    slot = _before(needed)[blocks] * _ROUND + 4 * rank + kind
    left = rank >= 4 * needed[blocks]  # there are as many fours
    free = torch.ones(int(needed.sum()) * _ROUND, dtype=torch.bool, device=blocks.device)
    free[slot[~left]] = False
    unused, of_block = free.nonzero()[:, 0], torch.repeat_interleave(needed * _ROUND)
    before = _before(torch.bincount(of_block[unused], minlength=len(needed)))
    those = left.nonzero()[:, 0]
    those = those[blocks[those].argsort(stable=True)]
    own = blocks[those]
    turn = torch.arange(len(those), device=blocks.device) - _before(torch.bincount(own, minlength=len(needed)))[own]
    slot[those] = unused[before[own] + turn]
    return slot


def _before(counts: torch.Tensor) -> torch.Tensor:
    """Return for each count the sum of those ahead of it."""
    return counts.cumsum(0) - counts


def _link(made: torch.Tensor, needed: torch.Tensor, further: torch.Tensor, first: torch.Tensor, rounds: int) -> None:
    """Mark rounds, [R, 4, 4], that another one follows, and say in the last of a block's own where further ones begin.

    Args:
        made: rounds, those of blocks ahead of the further ones; written.
        needed, further, first: of every block, its rounds, those that are further, and how many of these lie ahead.
        rounds: of a block, with a place of their own.
    """
    own = made[: len(needed) * rounds].view(len(needed), rounds, 4, 4)
    follows = torch.arange(1, rounds + 1, device=made.device) < needed[:, None]
    own[..., 1] += follows[:, :, None].long()
    parts = (first[:, None] >> 7 * torch.arange(4, device=made.device) & 0x7F) * (further > 0)[:, None]  # of four lanes
    own[:, -1, :, 1] += (parts & 3) << 15 | (parts >> 2 & 1) << 31
    own[:, -1, :, 3] += parts >> 3 & 1 | (parts >> 4 & 3) << 15 | parts >> 6 << 31
    behind = made[len(needed) * rounds :]
    lasts = (first + further - 1)[further > 0]
    behind[:, :, 1] += 1
    behind[lasts, :, 1] -= 1
