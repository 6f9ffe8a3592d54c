"""Kernel tiles: scales and zero points, in the order in which kernels/cuda/scales.cuh reads them.

One scale a row is a float32, read once; with a zero point a pair of 16-bit floats follows it. A table of eight 16-bit
floats is 16 bytes of its row: the lower bytes of all, then the upper ones. Scales in groups keep
their stored dtype: for every block of 16 rows by 128 channels, [S, 16] scales, then [S, 16] 16-bit floats where there
are zero points; blocks stand in the order of the tiles. Where codes become int8 of the whole row (`ratios`), the two
float32 that this takes of every row stand ahead of all blocks. What stands for a zero point is the number that decoding
adds to a code (`lanes.zero_constants`).
"""

from __future__ import annotations

import torch

from tersor.formats import SCALE_DTYPES, scale_values, store_scales
from tersor.layouts import decode_groups, ratios
from tersor.layouts.blocks import BLOCK_IC, BLOCK_OC, UNIT_OC, ic_blocks, oc_blocks
from tersor.layouts.packing import Packing, scales_in_block


def pack(scale: torch.Tensor, zero_point: torch.Tensor | None, packing: Packing, ic: int) -> torch.Tensor:
    """Return scales and zero points as kernels read them.

    Args:
        scale: [OC, G] in the scheme's scale dtype.
        zero_point: uint8 [OC, G], or `None` where the format has none.
        scheme: what they mean.
        ic: input channels.
        target: the dtype of the activations, a key of `lanes.TARGETS`.

    Returns:
        uint8, flat, on the same device.

    Raises:
        FormatError: a zero point that the target's 16-bit floats cannot apply exactly.
    """
    scheme, constants = packing.scheme, None
    if scheme.has_table:
        halves = _pad_rows(scale).view(torch.uint8).view(-1, scale.shape[1], 2)
        return halves.transpose(1, 2).reshape(-1)
    if zero_point is not None:
        constants = decode_groups.zero_constants(zero_point, scheme.format, packing.target)
    if scheme.group_size is None:
        rows = _pad_rows(scale_values(scale, scheme))
        if constants is None:
            return rows.view(torch.uint8).reshape(-1)
        pairs = _pad_rows(constants).expand(-1, 2)
        return torch.cat((rows.view(torch.uint8), pairs.contiguous().view(torch.uint8)), dim=1).reshape(-1)
    parts = [_blocks(scale, scheme.group_size, ic)]
    if constants is not None:
        parts.append(_blocks(constants, scheme.group_size, ic))
    blocks = torch.cat(parts, dim=1).reshape(-1)
    if not packing.by_ratios:
        return blocks
    rows = _pad_rows(ratios.row_terms(scale, zero_point, scheme))
    return torch.cat((rows.view(torch.uint8).reshape(-1), blocks))


def unpack(packed: torch.Tensor, packing: Packing, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Undo `pack`, exactly: return the scales [OC, G] in the scheme's dtype and the zero points, uint8 [OC, G]."""
    oc, scheme = shape[0], packing.scheme
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    constants = None
    if scheme.has_table:
        halves = packed.view(-1, 2, packing.scale_bytes // 2)[:oc].transpose(1, 2)
        return halves.reshape(oc, packing.scale_bytes).view(dtype), None
    if scheme.group_size is None:
        rows = packed.view(-1, packing.scale_bytes)[:oc]
        scale = store_scales(rows[:, :4].contiguous().view(torch.float32), scheme)
        if scheme.has_zero_point:
            constants = rows[:, 4:6].contiguous().view(torch.int16)
    else:
        block = BLOCK_OC * packing.scales_in_block
        if packing.by_ratios:
            packed = split(packed, oc)[1]
        blocks = packed.view(-1, block * packing.scale_bytes)
        scale = _from_blocks(blocks[:, : block * dtype.itemsize], dtype, scheme.group_size, shape)
        if scheme.has_zero_point:
            constants = _from_blocks(blocks[:, block * dtype.itemsize :], torch.int16, scheme.group_size, shape)
    return scale, None if constants is None else decode_groups.zero_points(constants, scheme.format, packing.target)


def split(packed: torch.Tensor, oc: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `pack` made for a packing by ratios in two: terms of rows, and scales of blocks."""
    terms = oc_blocks(oc) * BLOCK_OC * ratios.TERM_BYTES
    return packed[:terms], packed[terms:]


def _pad_rows(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % UNIT_OC)).contiguous()


def _blocks(values: torch.Tensor, group_size: int, ic: int) -> torch.Tensor:
    """Return [OC, G] values as the bytes of each block, [blocks, S * 16 * bytes of a value]."""
    in_block = scales_in_block(group_size)
    piece = BLOCK_IC // in_block
    across = ic_blocks(ic)
    pieces = _pad_rows(values).repeat_interleave(group_size // piece, dim=1)
    pieces = torch.nn.functional.pad(pieces, (0, across * in_block - pieces.shape[1]))
    axes = pieces.view(-1, UNIT_OC // BLOCK_OC, BLOCK_OC, across, in_block)
    ordered = axes.permute(0, 3, 1, 4, 2).contiguous()
    return ordered.view(-1, in_block * BLOCK_OC).view(torch.uint8)


def _from_blocks(blocks: torch.Tensor, dtype: torch.dtype, group_size: int, shape: tuple[int, int]) -> torch.Tensor:
    oc, ic = shape
    in_block = scales_in_block(group_size)
    piece = BLOCK_IC // in_block
    values = blocks.contiguous().view(dtype)
    axes = values.view(-1, ic_blocks(ic), UNIT_OC // BLOCK_OC, in_block, BLOCK_OC)
    pieces = axes.permute(0, 2, 4, 1, 3).reshape(oc_blocks(oc) * BLOCK_OC, -1)[:oc, : ic // piece]
    return pieces[:, :: group_size // piece].contiguous()
