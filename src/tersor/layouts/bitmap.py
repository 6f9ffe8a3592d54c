"""Which weights of a row are left? A mask of bits, and the numbers of those left in words, row after row.

Bit i of byte j of a row is column 8j + i. The numbers of a row, of 1 to 8, 16 or 32 bits each, are a little-endian bit
stream that ends with a whole 32-bit word, so that every row starts with one. Lengths follow from the mask alone.
Everything here is made of operators that run on any device, over a whole matrix at once.
"""

from __future__ import annotations

import torch

from tersor.formats.sparse import MASK_BITS, WORD_BITS
from tersor.layouts import stream

_STREAM_ELEMENTS = 32
_COUNTED = 1024
"""Elements whose count goes into eight bytes."""
_HOLDERS = {16: torch.int16, 32: torch.int32}
"""Bits of plain numbers -> the integers that hold them; codes of up to 8 bits are uint8."""


def holder(bits: int) -> torch.dtype:
    """Return the dtype that numbers of so many bits come in: uint8 up to 8 bits, int16, int32."""
    return torch.uint8 if bits <= 8 else _HOLDERS[bits]


def pack_mask(kept: torch.Tensor) -> torch.Tensor:
    """Return bool [rows, IC] as bits, uint8 [rows, ceil(IC / 8)]; the bits behind a row are 0."""
    rows, ic = kept.shape
    padded = torch.nn.functional.pad(kept.to(torch.uint8), (0, -ic % MASK_BITS)).view(rows, -1, MASK_BITS)
    weights = torch.arange(MASK_BITS, dtype=torch.uint8, device=kept.device)
    return (padded << weights).sum(2, dtype=torch.uint8)


def unpack_mask(mask: torch.Tensor, ic: int) -> torch.Tensor:
    """Undo `pack_mask`: return bool [rows, ic]."""
    bits = torch.arange(MASK_BITS, dtype=torch.uint8, device=mask.device)
    return ((mask.unsqueeze(2) >> bits) & 1).view(mask.shape[0], mask.shape[1] * MASK_BITS)[:, :ic].bool()


def count(mask: torch.Tensor) -> torch.Tensor:
    """Return how many bits every row of a mask [rows, bytes] has set, int32 [rows]."""
    pairs = mask - ((mask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(1, dtype=torch.int32)


def count_kept(kept: torch.Tensor) -> torch.Tensor:
    """Return how many of every row of bool [rows, IC] are true, int64 [rows]: `kept.sum(1)`, several times faster."""
    rows, ic = kept.shape
    padded = torch.nn.functional.pad(kept.view(torch.uint8), (0, -ic % _COUNTED)) if ic % _COUNTED else kept
    # Eight at a time, a byte each, which none of these sums overflows.
    eights = padded.contiguous().view(torch.int64).view(rows, -1, _COUNTED // 8).sum(2)
    return eights.view(torch.uint8).view(rows, -1).sum(1)


def pack_values(values: torch.Tensor, counts: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the numbers of all rows as words.

    Args:
        values: [sum of counts], the numbers of one row behind those of another, in `holder(bits)`.
        counts: int64 [rows] on the values' device.
        bits: of each.

    Returns:
        int32 [sum of ceil(count * bits / 32)].
    """
    if not values.numel():
        return torch.zeros(0, dtype=torch.int32, device=values.device)
    unit = _unit(bits)
    padded = (counts + unit - 1) // unit * unit
    room = values.new_zeros(int(padded.sum()))
    room[_moved(counts, padded)] = values
    if bits > 8:
        return room.view(torch.int32)
    words = stream.pack(room.view(-1, unit), bits).view(-1)
    return words[_moved(_words(counts, bits), padded // unit * bits)]


def unpack_values(words: torch.Tensor, counts: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `pack_values`: return [sum of counts] in `holder(bits)`."""
    if not words.numel():
        return torch.zeros(0, dtype=holder(bits), device=words.device)
    unit = _unit(bits)
    padded = (counts + unit - 1) // unit * unit
    if bits > 8:
        room = words.view(holder(bits))
    else:
        whole = padded // unit * bits
        streamed = words.new_zeros(int(whole.sum()))
        streamed[_moved(_words(counts, bits), whole)] = words
        room = stream.unpack(streamed.view(-1, bits), bits, unit).reshape(-1)
    return room[_moved(counts, padded)]


def take_rows(words: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the words of some rows, one row behind the other.

    Args:
        words: int32, of all rows.
        starts: int64 [all rows + 1], the first word of each, and the one after the last.
        rows: int64, which ones, in any order.
    """
    lengths = starts.diff()[rows]
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    shift = torch.repeat_interleave(starts[rows] - (ends - lengths), lengths, output_size=total)
    return words[torch.arange(total, device=words.device) + shift]


def values_at(words: torch.Tensor, starts: torch.Tensor, kept: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the number of every weight that is left, in its place, without waiting for the device.

    Args:
        words: int32, of all rows of a weight, at least one.
        starts: int64 [rows], the first word of each of these rows.
        kept: bool [rows, IC].
        bits: of a number.

    Returns:
        [rows, IC] in `holder(bits)`; what stands where nothing is left has no meaning.
    """
    rank = kept.cumsum(1, dtype=torch.int32)
    rank -= kept.to(torch.int32)
    if bits >= 8:
        return _gathered(words.view(holder(bits)), starts * (WORD_BITS // bits), rank)
    held = words.view(torch.uint8)
    place = rank.mul_(bits)
    first, inside = starts * 4, place >> 3
    codes = _gathered(held, first, inside).to(torch.int32)
    codes |= _gathered(held, first, inside + 1).to(torch.int32) << 8
    codes >>= place & 7
    return codes.to(torch.uint8).bitwise_and_((1 << bits) - 1)


def _gathered(held: torch.Tensor, starts: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Return the elements [rows, IC] that stand `inside` so far behind the start of their row, int64 [rows].

    Behind the last element stands the last one again.
    """
    narrow = len(held) <= torch.iinfo(torch.int32).max
    index = starts.to(torch.int32 if narrow else torch.int64).unsqueeze(1) + inside
    return held.index_select(0, index.clamp_(max=len(held) - 1).view(-1)).view(inside.shape)


def _unit(bits: int) -> int:
    """Return the numbers that rows are filled up to while they are packed."""
    return _STREAM_ELEMENTS if bits <= 8 else WORD_BITS // bits


def _words(counts: torch.Tensor, bits: int) -> torch.Tensor:
    return (counts * bits + WORD_BITS - 1) // WORD_BITS


def _moved(counts: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Return where each of `counts` elements of every row stands once every row has `room` of them."""
    total = int(counts.sum())
    ahead = (room.cumsum(0) - room) - (counts.cumsum(0) - counts)
    return torch.arange(total, device=counts.device) + torch.repeat_interleave(ahead, counts, output_size=total)
