"""Kernel tiles of a pruned weight: the bitmap in the order of the tensor cores' lanes, and queues of values.

A block is 64 rows by 128 channels, a unit's: four warps of 32 lanes have 64 weights each, as in `tiles`. Bit 2 r + e
of a lane's 64 is weight e of its register r = 4 step + 2 half + i: row 8 i + g of the warp's 16, channel 16 step +
8 half + 2 t + e, for lane 4 g + t. The values of the ones follow each other in that order in one of the unit's 128
queues, and those of the next block behind them; in block b of a run lane l of a warp reads the warp's queue
(l + 5 b) % 32, which evens out rows and channels that have more weights left than others.

Word j of all queues is a layer of 512 bytes. The queues of a run of blocks are as long as the longest of them: where n
weights a lane are left with a density of d, some 2.6 sqrt((1 - d) / n) longer than their values, 4 % at 50 % and 7,000
channels. A density that varies from block to block costs nothing.

A kernel keeps a ring of at least `LAG` layers. So a queue that has fewer values than others by more than that goes on
further behind: a block's mark says how many layers of the run it reaches into, and which layers no lane reads any more
from that block on (`_Places`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tersor.errors import ShapeError
from tersor.layouts.blocks import BLOCK_IC, UNIT_OC, ic_blocks

LAG = 64
"""Layers between the first one that some lane reads in a block and the last one."""
LAYER_WORDS = 128
"""Words of a layer: one of every queue."""
_LANES = 128
_WARP = 32
_WEIGHTS = 64
_STEP = 5
_MOST_LAYERS = 1 << 16
_CHUNK_WEIGHTS = 1 << 24
"""Weights laid out at a time: bounds the scratch memory to some 300 MB."""


@dataclass(frozen=True, slots=True)
class SparseTiles:
    """A pruned weight as a kernel reads it.

    Attributes:
        shape: (OC, IC).
        bits: what a value takes, 8 or 16.
        runs: ranges of blocks of channels that begin their queues anew: what a tile's sums may be split into.
        mask: int32 [units, blocks, 128, 2], 64 bits a lane.
        layers: int32 [layers, 128], a word of every queue.
        starts: int32 [units, runs], the first layer of each run.
        marks: int32 [units, blocks], layers of the run reached, and 16 bits up those done with.
    """

    shape: tuple[int, int]
    bits: int
    runs: int
    mask: torch.Tensor
    layers: torch.Tensor
    starts: torch.Tensor
    marks: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(one.nbytes for one in (self.mask, self.layers, self.starts, self.marks))

    def units(self, first: int, last: int) -> SparseTiles:
        """Return the tiles of a span of units, sharing memory with these; waits for the device."""
        starts = self.starts[first:last]
        begin = int(self.starts[first, 0]) if len(starts) else 0
        end = int(self.starts[last, 0]) if last < len(self.starts) else len(self.layers)
        rows = min(last * UNIT_OC, self.shape[0]) - first * UNIT_OC
        return SparseTiles(
            (rows, self.shape[1]), self.bits, self.runs, self.mask[first:last], self.layers[begin:end], starts - begin,
            self.marks[first:last],
        )  # fmt: skip


def run_blocks(ic: int, runs: int) -> list[tuple[int, int]]:
    """Return the first block of each run, and the one after its last: as kernels deal blocks out to splits."""
    least, more = divmod(ic_blocks(ic), runs)
    ends = [(part + 1) * least + min(part + 1, more) for part in range(runs)]
    return list(zip([0, *ends], ends, strict=False))


def pack(kept: torch.Tensor, values: torch.Tensor, runs: int) -> SparseTiles:
    """Lay a pruned weight out.

    Args:
        kept: bool [OC, IC], which weights are left.
        values: uint8 or int16 [OC, IC], what stands for them in queues (`SparsePacking.pack`); others do not count.
        runs: ranges of blocks, at most as many as there are blocks.

    Raises:
        ShapeError: more runs than blocks, or a run whose queues have more words than a mark can tell.
    """
    oc, ic = kept.shape
    blocks = ic_blocks(ic)
    if not 1 <= runs <= blocks:
        raise ShapeError(f"{blocks} blocks of channels cannot be cut into {runs} runs")
    bits = 8 * values.element_size()
    masks, queues, starts, marks = [], [], [], []
    first = 0
    for rows in _chunks(oc, ic):
        left, numbers = _lanes(kept[rows]), _lanes(values[rows])
        masks.append(_mask_words(left))
        places = _Places.of(left.sum(-1), ic, bits, runs)
        starts.append(places.starts + first)
        marks.append(places.marks)
        at = places.elements(left, bits)
        words = torch.zeros(places.layers * LAYER_WORDS * 32 // bits, dtype=values.dtype, device=values.device)
        words[at[left]] = numbers[left]
        queues.append(words.view(torch.int32).view(-1, LAYER_WORDS))
        first += places.layers
    if first >= 1 << 31:
        raise ShapeError(f"a pruned weight {[oc, ic]} has {first} layers of values, more than a kernel can number")
    joined = [torch.cat(parts) for parts in (masks, queues, starts, marks)]
    return SparseTiles((oc, ic), bits, runs, joined[0], joined[1], joined[2].int(), joined[3])


def unpack(tiles: SparseTiles) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `pack`: return which weights are left, bool [OC, IC], and values, uint8 or int16, zeros for the others."""
    oc, ic = tiles.shape
    kept, values = [], []
    unit, layer = 0, 0
    for rows in _chunks(oc, ic):
        units = -(-(min(rows.stop, oc) - rows.start) // UNIT_OC)
        left = _mask_bits(tiles.mask[unit : unit + units])
        places = _Places.of(left.sum(-1), ic, tiles.bits, tiles.runs)
        words = tiles.layers[layer : layer + places.layers].reshape(-1)
        words = words.view(torch.uint8 if tiles.bits == 8 else torch.int16)
        numbers = torch.zeros(left.shape, dtype=words.dtype, device=words.device)
        numbers[left] = words[places.elements(left, tiles.bits)[left]]
        kept.append(_rows(left, oc - rows.start, ic))
        values.append(_rows(numbers, oc - rows.start, ic))
        unit += units
        layer += places.layers
    return torch.cat(kept), torch.cat(values)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the values of some units stand in their queues.

    Attributes:
        first: int64 [units, blocks, 128], bits ahead of a lane's first value in its queue, from the first layer on.
        queue: int64 [blocks, 128], which queue that is.
        starts: int64 [units, runs], the first layer of a run.
        marks: int32 [units, blocks].
        layers: how many there are.
    """

    first: torch.Tensor
    queue: torch.Tensor
    starts: torch.Tensor
    marks: torch.Tensor
    layers: int

    @staticmethod
    def of(counts: torch.Tensor, ic: int, bits: int, runs: int) -> _Places:
        """Place so many values a lane, int64 [units, blocks, 128]."""
        units, device = counts.shape[0], counts.device
        lane = torch.arange(_LANES, device=device)
        warp = lane // _WARP * _WARP
        first: list[torch.Tensor] = []
        reached: list[torch.Tensor] = []
        done, queues, lengths = [], [], []
        for begin, end in run_blocks(ic, runs):
            place = torch.zeros(units, _LANES, dtype=torch.int64, device=device)
            for block in range(begin, end):
                queue = warp + (lane + _STEP * (block - begin)) % _WARP
                taken = counts[:, block] * bits
                after = place[:, queue] + taken
                most = (after.amax(1) + 31) // 32
                if block > begin:
                    most = torch.maximum(most, reached[-1])
                least = torch.maximum(place.amin(1) // 32, most - LAG)
                own = torch.maximum(place[:, queue], least[:, None] * 32)
                place[:, queue] = own + taken
                first.append(own)
                queues.append(queue)
                reached.append(most)
                done.append(least)
            lengths.append(reached[-1])
        marks = torch.stack(reached, 1)
        if units and int(marks.max()) >= _MOST_LAYERS:
            raise ShapeError(f"a run of queues has {int(marks.max())} words, more than a mark can tell")
        length = torch.stack(lengths, 1)
        starts = (length.reshape(-1).cumsum(0) - length.reshape(-1)).view_as(length)
        marks = marks | torch.stack(done, 1) << 16
        marks = torch.where(marks >= 1 << 31, marks - (1 << 32), marks).to(torch.int32)
        return _Places(torch.stack(first, 1), torch.stack(queues), starts, marks, int(length.sum()))

    def elements(self, left: torch.Tensor, bits: int) -> torch.Tensor:
        """Return where the values of ones, bool [units, blocks, 128, 64], stand among all of so many bits, int64."""
        blocks, runs = left.shape[1], self.starts.shape[1]
        of_block = torch.empty(blocks, dtype=torch.int64)
        for run, (begin, end) in enumerate(run_blocks(blocks * BLOCK_IC, runs)):
            of_block[begin:end] = run
        start = self.starts[:, of_block.to(left.device)]
        at = (self.first // bits)[..., None] + left.cumsum(-1) - 1
        in_word = 32 // bits
        layer = start[:, :, None, None] + at // in_word
        return (layer * LAYER_WORDS + self.queue[None, :, :, None]) * in_word + at % in_word


def _chunks(oc: int, ic: int) -> Iterator[slice]:
    """Yield the rows laid out at a time: whole units."""
    step = max(1, _CHUNK_WEIGHTS // (UNIT_OC * BLOCK_IC * ic_blocks(ic))) * UNIT_OC
    return (slice(first, first + step) for first in range(0, oc, step))


def _lanes(rows: torch.Tensor) -> torch.Tensor:
    """Return rows [R, IC] as lanes have them, [units, blocks, 128, 64], zeros behind the last row and channel."""
    padding = (0, -rows.shape[1] % BLOCK_IC, 0, -rows.shape[0] % UNIT_OC)
    padded = torch.nn.functional.pad(rows, padding)
    # Row = 16 warp + 8 i + g, channel = 16 step + 8 half + 2 t + e.
    axes = padded.view(-1, 4, 2, 8, padded.shape[1] // BLOCK_IC, 8, 2, 4, 2)
    return axes.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).reshape(axes.shape[0], -1, _LANES, _WEIGHTS)


def _rows(lanes: torch.Tensor, oc: int, ic: int) -> torch.Tensor:
    """Undo `_lanes`."""
    units, blocks = lanes.shape[:2]
    axes = lanes.view(units, blocks, 4, 8, 4, 8, 2, 2, 2).permute(0, 2, 7, 3, 1, 5, 6, 4, 8)
    return axes.reshape(units * UNIT_OC, blocks * BLOCK_IC)[:oc, :ic]


def _mask_words(left: torch.Tensor) -> torch.Tensor:
    """Return bits, bool [..., 64], as words, int32 [..., 2], the lowest bit first."""
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=left.device)
    octets = (left.view(*left.shape[:-1], 8, 8) * weights).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)


def _mask_bits(words: torch.Tensor) -> torch.Tensor:
    """Undo `_mask_words`."""
    octets = words.contiguous().view(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((octets[..., None] >> places) & 1).bool().flatten(-2)
