"""How the blocks of a pruned weight are dealt out evenly to the places of a chip: decided as the weight is laid out.

A tile of four units, 256 rows, has a row of blocks of 128 channels; its blocks and those of the tiles behind it are one
long row, which is cut into as many ranges as there are places, a multiprocessor each. A block takes as long as its
bytes are fetched, or as its weights are expanded where that is longer (`least`): so ranges take equally long, to a
block, whatever the density of rows, columns or tiles. Queues of values begin anew where a range begins, which costs
their unequal ends: some 1 % of a tile's bytes a cut, of which there are as many as places.

What is added where: sparse/work.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tersor.errors import ShapeError
from tersor.layouts.blocks import BLOCK_IC, UNIT_OC, ic_blocks

CUT_UNITS = 4
"""Units that are cut in the same blocks: every tile of a kernel has as many units or divides them."""
PLACE_NUMBERS = 4


@dataclass(frozen=True, slots=True)
class Cuts:
    """The ranges of blocks of all places.

    Attributes:
        places: int32 [places, 4], of each: its first block of all tiles', the one behind its last, how many places have
            blocks of its first tile ahead of it, and how many have blocks of its last tile behind it.
        anew: bool [units, blocks], where queues begin anew, beside the first block of every unit.
    """

    places: torch.Tensor
    anew: torch.Tensor

    @staticmethod
    def of(kept: torch.Tensor, bits: int, places: int, least: int) -> Cuts:
        """Cut a weight.

        Args:
            kept: bool [OC, IC], which weights are left.
            bits: what a value takes, 8 or 16.
            places: at most as many as there are blocks of tiles; 0 cuts nothing.
            least: bytes that a unit's block counts as, where it has fewer.

        Raises:
            ShapeError: more places than blocks.
        """
        oc, ic = kept.shape
        units, blocks, device = -(-oc // UNIT_OC), ic_blocks(ic), kept.device
        tiles = -(-units // CUT_UNITS)
        if places > tiles * blocks:
            raise ShapeError(f"{tiles * blocks} blocks of 256 rows cannot be dealt out to {places} places")
        anew = torch.zeros(tiles, CUT_UNITS, blocks, dtype=torch.bool, device=device)
        if not places:
            return Cuts(torch.zeros(0, PLACE_NUMBERS, dtype=torch.int32, device=device), anew.view(-1, blocks)[:units])
        cost = torch.zeros(tiles * CUT_UNITS, blocks, dtype=torch.int64, device=device)
        cost[:units] = _left(kept) * (bits // 8) + UNIT_OC * BLOCK_IC // 8
        cost[:units].clamp_(min=least)
        ends = cost.view(tiles, CUT_UNITS, blocks).sum(1).view(-1).cumsum(0)
        begins = _evenly(torch.cat([ends.new_zeros(1), ends]), places)
        anew.view(tiles, CUT_UNITS, blocks)[begins[:-1] // blocks, :, begins[:-1] % blocks] = True
        anew[:, :, 0] = False
        return Cuts(_neighbours(begins, blocks), anew.view(-1, blocks)[:units])


def _left(kept: torch.Tensor) -> torch.Tensor:
    """Return how many weights are left of each unit's blocks, int64 [units, blocks]."""
    oc, ic = kept.shape
    rows = torch.nn.functional.pad(kept, (0, -ic % BLOCK_IC)).view(oc, -1, BLOCK_IC).sum(-1, dtype=torch.int32)
    units = torch.nn.functional.pad(rows, (0, 0, 0, -oc % UNIT_OC)).view(-1, UNIT_OC, rows.shape[1])
    return units.sum(1, dtype=torch.int64)


def _evenly(before: torch.Tensor, places: int) -> torch.Tensor:
    """Return where ranges of equal cost begin, and the end: int64 [places + 1], every range with a block at least.

    Args:
        before: int64 [blocks + 1], the cost of all blocks ahead of each.
        places: how many ranges, at most as many as blocks.
    """
    count, device = len(before) - 1, before.device
    number = torch.arange(places + 1, device=device)
    wanted = number * before[-1] // places
    found = torch.searchsorted(before, wanted)
    nearer = wanted - before[(found - 1).clamp_min(0)] < before[found] - wanted
    found = (found - nearer.long()).clamp_min(0)
    ascending = (found - number).cummax(0).values + number
    begins = torch.minimum(ascending, count - places + number)
    begins[0], begins[-1] = 0, count
    return begins


def _neighbours(begins: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return `Cuts.places` of ranges of so many blocks a tile."""
    begin, end = begins[:-1].contiguous(), begins[1:].contiguous()
    number = torch.arange(len(begin), device=begin.device)
    first_tile, last_tile = begin // blocks, (end - 1) // blocks
    # The place that has the first block of a tile, and the one that has the last one.
    first = torch.searchsorted(begin, first_tile * blocks, right=True) - 1
    last = torch.searchsorted(begin, (last_tile + 1) * blocks - 1, right=True) - 1
    return torch.stack([begin, end, number - first, last - number], 1).int()
