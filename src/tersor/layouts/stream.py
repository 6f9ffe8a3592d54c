"""The stored stream: the one packing on disk, a little-endian bit stream along the input channels.

Element k of a row occupies bits k*bits .. k*bits+bits-1 of the row, the lowest bit first; a row is padded with zero
codes to a multiple of 32 elements and viewed as int32 words. Three other formats store the same bytes: humming,
compressed-tensors (pack-quantized, and mxfp6-pack-quantized viewed as bytes) and Quark's MXFP6.
"""

from __future__ import annotations

import torch

from tersor.formats.scheme import ROW_ELEMENTS


def row_words(ic: int, bits: int) -> int:
    """Return how many int32 words a row of `ic` elements of `bits` bits takes."""
    return -(-ic // ROW_ELEMENTS) * bits


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into the stored stream.

    Args:
        codes: uint8 [..., IC], every code below 2^bits.
        bits: 1 to 8.

    Returns:
        int32 [..., row_words(IC, bits)] on the same device.
    """
    ic = codes.shape[-1]
    padding = -ic % ROW_ELEMENTS
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    if bits == 8:
        return _contiguous(codes).view(torch.int32)
    # Eight codes, one a byte, are squeezed together in three steps: pairs, fours, eights.
    octets = _contiguous(codes).view(torch.int64)
    for step in range(3):
        width = bits << step
        spread = 8 << step
        low = _repeat((1 << width) - 1, 2 * spread)
        octets = (octets & low) | ((octets >> (spread - width)) & _repeat(((1 << width) - 1) << width, 2 * spread))
    squeezed = octets.view(torch.uint8).view(*octets.shape, 8)[..., :bits]
    return squeezed.contiguous().view(*codes.shape[:-1], -1).view(torch.int32)


def unpack(stream: torch.Tensor, bits: int, ic: int) -> torch.Tensor:
    """Undo `pack`.

    Args:
        stream: int32 [..., row_words(ic, bits)].
        bits: 1 to 8.
        ic: elements in a row.

    Returns:
        uint8 codes [..., ic].
    """
    stream = _contiguous(stream)
    if bits == 8:
        return stream.view(torch.uint8)[..., :ic]
    squeezed = stream.view(torch.uint8)
    groups = squeezed.view(*squeezed.shape[:-1], -1, bits)
    octets = torch.nn.functional.pad(groups, (0, 8 - bits)).view(torch.int64)[..., 0]
    for step in (2, 1, 0):
        width = bits << step
        spread = 8 << step
        low = _repeat((1 << width) - 1, 2 * spread)
        octets = (octets & low) | ((octets << (spread - width)) & _repeat(((1 << width) - 1) << spread, 2 * spread))
    return octets.view(torch.uint8)[..., :ic]


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in one piece whose strides say so: an axis of one entry may have any."""
    return tensor.reshape(-1).view(tensor.shape)


def _repeat(pattern: int, every: int) -> int:
    """Repeat a bit pattern at every so many bits of a 64-bit word, as the signed integer torch wants."""
    word = 0
    for shift in range(0, 64, every):
        word |= pattern << shift
    return word - (1 << 64) if word >> 63 else word
