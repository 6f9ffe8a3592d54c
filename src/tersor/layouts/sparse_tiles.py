"""Kernel tiles of a pruned weight: the bitmap in the order of the tensor cores' lanes, and queues of values.

A block is 64 rows by 128 channels, a unit's: four warps of 32 lanes have 64 weights each, as in `tiles`. Bit 2 r + e
of a lane's 64 is weight e of its register r = 4 step + 2 half + i: row 8 i + g of the warp's 16, channel 16 step +
8 half + 2 t + e, for lane 4 g + t; beside 8-bit activations bit 4 r + e is channel 32 step + 16 half + 4 t + e.
The values of the ones follow each other in that order in one of the unit's 128
queues, and those of the next block behind them; in block b lane l of a warp reads the warp's queue
(l + 5 b) % 32, which evens out rows and channels that have more weights left than others.

Word j of all queues is a layer of 512 bytes. The queues of a unit are as long as the longest of them: where n
weights a lane are left with a density of d, some 2.6 sqrt((1 - d) / n) longer than their values, 4 % at 50 % and 7,000
channels. A density that varies from block to block costs nothing. Where a weight is cut (`sparse_cuts`), queues begin
anew in a layer of their own.

A kernel keeps a ring of at least `LAG` layers and `BEYOND` more. So a queue that has fewer values than others by more
than that goes on further behind: a block's mark says how many layers of the unit it reaches into, and which layers no
lane reads any more from that block on (`_Places`): where queues begin anew, all that were reached before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tersor.errors import ShapeError
from tersor.layouts.blocks import BLOCK_IC, UNIT_OC, ic_blocks
from tersor.layouts.sparse_cuts import PLACE_NUMBERS, Cuts

BEYOND = 3
"""Layers behind that of a queue's last value which a kernel may read, too: three words are fetched for any values."""
LAG = 64 - BEYOND
"""Layers between the first one that some lane reads in a block and the last one with a value."""
LAYER_WORDS = 128
"""Words of a layer: one of every queue."""
_LANES = 128
_WARP = 32
_WEIGHTS = 64
_STEP = 5
_TURNED = 3
_MOST_LAYERS = 1 << 16
_CHUNK_WEIGHTS = 1 << 24
"""Weights laid out at a time: bounds the scratch memory to some 300 MB."""


@dataclass(frozen=True, slots=True)
class SparseTiles:
    """A pruned weight as a kernel reads it.

    Attributes:
        shape: (OC, IC).
        bits: what a value takes, 8 or 16.
        four: whether a register has four weights, beside 8-bit activations.
        mask: int32 [units, blocks, 128, 2], 64 bits a lane, the bits of each word turned left by `_TURNED`.
        layers: int32 [layers, 128], a word of every queue.
        starts: int32 [4 places + units], what each place has (`Cuts.places`), then the first layer of each unit.
        marks: int32 [units, blocks], layers of the unit reached, and 16 bits up those done with.
    """

    shape: tuple[int, int]
    bits: int
    four: bool
    mask: torch.Tensor
    layers: torch.Tensor
    starts: torch.Tensor
    marks: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(one.nbytes for one in (self.mask, self.layers, self.starts, self.marks))

    @property
    def places(self) -> int:
        """Ranges of blocks that take equally long, each of which begins its queues anew; 0 where nothing is cut."""
        return places_of(self.starts, self.marks)

    def units(self, first: int, last: int) -> SparseTiles:
        """Return the tiles of a span of units, without places, sharing memory with these; waits for the device."""
        every = self.starts[PLACE_NUMBERS * self.places :]
        starts = every[first:last]
        begin = int(every[first]) if len(starts) else 0
        end = int(every[last]) if last < len(every) else len(self.layers)
        rows = min(last * UNIT_OC, self.shape[0]) - first * UNIT_OC
        return SparseTiles(
            (rows, self.shape[1]), self.bits, self.four, self.mask[first:last], self.layers[begin:end],
            starts - begin, self.marks[first:last],
        )  # fmt: skip


def places_of(starts: torch.Tensor, marks: torch.Tensor) -> int:
    """Return how many places there are, by the shapes of two tensors of `SparseTiles`."""
    return (starts.shape[0] - marks.shape[0]) // PLACE_NUMBERS


def pack(kept: torch.Tensor, values: torch.Tensor, places: int, least: int = 0, four: bool = False) -> SparseTiles:
    """Lay a pruned weight out.

    Args:
        kept: bool [OC, IC], which weights are left.
        values: uint8 or int16 [OC, IC], what stands for them in queues (`SparsePacking.pack`); others do not count.
        places, least: how it is cut (`Cuts.of`).
        four: whether registers are to have four weights, beside 8-bit activations.

    Raises:
        ShapeError: more places than blocks, or a unit whose queues have more words than a mark can tell.
    """
    oc, ic = kept.shape
    bits = 8 * values.element_size()
    cuts = Cuts.of(kept, bits, places, least)
    masks, queues, starts, marks = [], [], [cuts.places.reshape(-1)], []
    first = 0
    for rows in _chunks(oc, ic):
        left, numbers = _lanes(kept[rows], four), _lanes(values[rows], four)
        masks.append(_mask_words(left))
        units = slice(rows.start // UNIT_OC, -(-min(rows.stop, oc) // UNIT_OC))
        found = _Places.of(left.sum(-1), bits, cuts.anew[units])
        starts.append(found.starts + first)
        marks.append(found.marks)
        at = found.elements(left, bits)
        words = torch.zeros(found.layers * LAYER_WORDS * 32 // bits, dtype=values.dtype, device=values.device)
        words[at[left]] = numbers[left]
        queues.append(words.view(torch.int32).view(-1, LAYER_WORDS))
        first += found.layers
    if first >= 1 << 31:
        raise ShapeError(f"a pruned weight {[oc, ic]} has {first} layers of values, more than a kernel can number")
    joined = [torch.cat(parts) for parts in (masks, queues, marks)]
    return SparseTiles((oc, ic), bits, four, joined[0], joined[1], torch.cat([one.int() for one in starts]), joined[2])


def unpack(tiles: SparseTiles) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `pack`: return which weights are left, bool [OC, IC], and values, uint8 or int16, zeros for the others."""
    oc, ic = tiles.shape
    kept, values = [], []
    unit, layer = 0, 0
    for rows in _chunks(oc, ic):
        units = -(-(min(rows.stop, oc) - rows.start) // UNIT_OC)
        left = _mask_bits(tiles.mask[unit : unit + units])
        places = _Places.of(left.sum(-1), tiles.bits, _anew(tiles.marks[unit : unit + units]))
        words = tiles.layers[layer : layer + places.layers].reshape(-1)
        words = words.view(torch.uint8 if tiles.bits == 8 else torch.int16)
        numbers = torch.zeros(left.shape, dtype=words.dtype, device=words.device)
        numbers[left] = words[places.elements(left, tiles.bits)[left]]
        kept.append(_rows(left, oc - rows.start, ic, tiles.four))
        values.append(_rows(numbers, oc - rows.start, ic, tiles.four))
        unit += units
        layer += places.layers
    return torch.cat(kept), torch.cat(values)


def _anew(marks: torch.Tensor) -> torch.Tensor:
    """Return where queues begin anew, bool [units, blocks]: where layers are done with that had just been reached.

    Queues that happen to be equally long, and to fill their words, begin anew as they would go on.
    """
    marks = marks.long() & 0xFFFFFFFF
    reached = torch.nn.functional.pad(marks & 0xFFFF, (1, -1))
    return marks >> 16 == reached


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the values of some units stand in their queues.

    Attributes:
        first: int64 [units, blocks, 128], bits ahead of a lane's first value in its queue, from the first layer on.
        queue: int64 [blocks, 128], which queue that is.
        starts: int64 [units], the first layer of each.
        marks: int32 [units, blocks].
        layers: how many there are.
    """

    first: torch.Tensor
    queue: torch.Tensor
    starts: torch.Tensor
    marks: torch.Tensor
    layers: int

    @staticmethod
    def of(counts: torch.Tensor, bits: int, anew: torch.Tensor) -> _Places:
        """Place so many values a lane, int64 [units, blocks, 128]; `anew`: where queues begin, bool [units, blocks]."""
        (units, blocks), device = counts.shape[:2], counts.device
        lane = torch.arange(_LANES, device=device)
        warp = lane // _WARP * _WARP
        first, reached, done, queues = [], [], [], []
        place = torch.zeros(units, _LANES, dtype=torch.int64, device=device)
        most = torch.zeros(units, dtype=torch.int64, device=device)
        for block in range(blocks):
            queue = warp + (lane + _STEP * block) % _WARP
            place = torch.where(anew[:, block, None], most[:, None] * 32, place)
            taken = counts[:, block] * bits
            most = torch.maximum(((place[:, queue] + taken).amax(1) + 31) // 32, most)
            least = torch.maximum(place.amin(1) // 32, most - LAG)
            own = torch.maximum(place[:, queue], least[:, None] * 32)
            place[:, queue] = own + taken
            first.append(own)
            queues.append(queue)
            reached.append(most)
            done.append(least)
        marks = torch.stack(reached, 1)
        if units and int(marks.max()) >= _MOST_LAYERS:
            raise ShapeError(f"queues of a unit have {int(marks.max())} words, more than a mark can tell")
        starts = most.cumsum(0) - most
        marks = marks | torch.stack(done, 1) << 16
        marks = torch.where(marks >= 1 << 31, marks - (1 << 32), marks).to(torch.int32)
        return _Places(torch.stack(first, 1), torch.stack(queues), starts, marks, int(most.sum()))

    def elements(self, left: torch.Tensor, bits: int) -> torch.Tensor:
        """Return where the values of ones, bool [units, blocks, 128, 64], stand among all of so many bits, int64."""
        at = (self.first // bits)[..., None] + left.cumsum(-1) - 1
        in_word = 32 // bits
        layer = self.starts[:, None, None, None] + at // in_word
        return (layer * LAYER_WORDS + self.queue[None, :, :, None]) * in_word + at % in_word


def _chunks(oc: int, ic: int) -> Iterator[slice]:
    """Yield the rows laid out at a time: whole units."""
    step = max(1, _CHUNK_WEIGHTS // (UNIT_OC * BLOCK_IC * ic_blocks(ic))) * UNIT_OC
    return (slice(first, first + step) for first in range(0, oc, step))


def _lanes(rows: torch.Tensor, four: bool) -> torch.Tensor:
    """Return rows [R, IC] as lanes have them, [units, blocks, 128, 64], zeros behind the last row and channel."""
    padding = (0, -rows.shape[1] % BLOCK_IC, 0, -rows.shape[0] % UNIT_OC)
    padded = torch.nn.functional.pad(rows, padding)
    # Row = 16 warp + 8 i + g, channel = 16 step + 8 half + 2 t + e, or 32 step + 16 half + 4 t + e.
    steps, elements = (4, 4) if four else (8, 2)
    axes = padded.view(-1, 4, 2, 8, padded.shape[1] // BLOCK_IC, steps, 2, 4, elements)
    return axes.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).reshape(axes.shape[0], -1, _LANES, _WEIGHTS)


def _rows(lanes: torch.Tensor, oc: int, ic: int, four: bool) -> torch.Tensor:
    """Undo `_lanes`."""
    units, blocks = lanes.shape[:2]
    steps, elements = (4, 4) if four else (8, 2)
    axes = lanes.view(units, blocks, 4, 8, 4, steps, 2, 2, elements).permute(0, 2, 7, 3, 1, 5, 6, 4, 8)
    return axes.reshape(units * UNIT_OC, blocks * BLOCK_IC)[:oc, :ic]


def _mask_words(left: torch.Tensor) -> torch.Tensor:
    """Return bits, bool [..., 64], as words, int32 [..., 2], the lowest bit first, then turned."""
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=left.device)
    turned = left.view(*left.shape[:-1], 2, 32).roll(_TURNED, -1)
    octets = (turned.reshape(*left.shape[:-1], 8, 8) * weights).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)


def _mask_bits(words: torch.Tensor) -> torch.Tensor:
    """Undo `_mask_words`."""
    octets = words.contiguous().view(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    turned = ((octets[..., None] >> places) & 1).bool().view(*words.shape, 32)
    return turned.roll(-_TURNED, -1).flatten(-2)
