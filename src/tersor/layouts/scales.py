"""Kernel tiles: scales and zero points, in the order in which kernels/cuda/scales.cuh reads them.

One scale a row is a float32, read once; with a zero point a pair of 16-bit floats follows it. Scales in groups keep
their stored dtype: for every block of 16 rows by 128 channels, [S, 16] scales, then [S, 16] 16-bit floats where there
are zero points; blocks stand in the order of the tiles. What stands for a zero point is the number that decoding adds
to a code (`lanes.zero_constants`).
"""

from __future__ import annotations

import torch

from tersor.formats import SCALE_DTYPES, Scheme, scale_values, store_scales
from tersor.layouts import decode_groups, tiles


def scale_bytes(scheme: Scheme) -> int:
    """Return the bytes that one scale takes in tiles, with its zero point."""
    if scheme.group_size is None:
        return 8 if scheme.has_zero_point else 4
    return SCALE_DTYPES[scheme.scale_dtype].itemsize + (2 if scheme.has_zero_point else 0)


def row_bytes(scheme: Scheme) -> int:
    """Return the bytes that the scales of one row take in a block; 0 for one scale a row, which lies elsewhere."""
    return tiles.scales_in_block(scheme.group_size) * scale_bytes(scheme)


def pack(scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme, ic: int, target: str) -> torch.Tensor:
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
    constants = None if zero_point is None else decode_groups.zero_constants(zero_point, scheme.format, target)
    if scheme.group_size is None:
        rows = _pad_rows(scale_values(scale, scheme))
        if constants is None:
            return rows.view(torch.uint8).reshape(-1)
        pairs = _pad_rows(constants).expand(-1, 2)
        return torch.cat((rows.view(torch.uint8), pairs.contiguous().view(torch.uint8)), dim=1).reshape(-1)
    parts = [_blocks(scale, scheme.group_size, ic)]
    if constants is not None:
        parts.append(_blocks(constants, scheme.group_size, ic))
    return torch.cat(parts, dim=1).reshape(-1)


def unpack(
    packed: torch.Tensor, scheme: Scheme, shape: tuple[int, int], target: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Undo `pack`, exactly: return the scales [OC, G] in the scheme's dtype and the zero points, uint8 [OC, G]."""
    oc, _ = shape
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    constants = None
    if scheme.group_size is None:
        rows = packed.view(-1, scale_bytes(scheme))[:oc]
        scale = store_scales(rows[:, :4].contiguous().view(torch.float32), scheme)
        if scheme.has_zero_point:
            constants = rows[:, 4:6].contiguous().view(torch.int16)
    else:
        block = tiles.ROWS * tiles.scales_in_block(scheme.group_size)
        blocks = packed.view(-1, block * scale_bytes(scheme))
        scale = _from_blocks(blocks[:, : block * dtype.itemsize], dtype, scheme.group_size, shape)
        if scheme.has_zero_point:
            constants = _from_blocks(blocks[:, block * dtype.itemsize :], torch.int16, scheme.group_size, shape)
    return scale, None if constants is None else decode_groups.zero_points(constants, scheme.format, target)


def _pad_rows(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % tiles.UNIT_ROWS)).contiguous()


def _blocks(values: torch.Tensor, group_size: int, ic: int) -> torch.Tensor:
    """Return [OC, G] values as the bytes of each block, [blocks, S * 16 * bytes of a value]."""
    in_block = tiles.scales_in_block(group_size)
    piece = tiles.COLUMNS // in_block
    across = tiles.column_blocks(ic)
    pieces = _pad_rows(values).repeat_interleave(group_size // piece, dim=1)
    pieces = torch.nn.functional.pad(pieces, (0, across * in_block - pieces.shape[1]))
    axes = pieces.view(-1, tiles.UNIT_ROWS // tiles.ROWS, tiles.ROWS, across, in_block)
    ordered = axes.permute(0, 3, 1, 4, 2).contiguous()
    return ordered.view(-1, in_block * tiles.ROWS).view(torch.uint8)


def _from_blocks(blocks: torch.Tensor, dtype: torch.dtype, group_size: int, shape: tuple[int, int]) -> torch.Tensor:
    oc, ic = shape
    in_block = tiles.scales_in_block(group_size)
    piece = tiles.COLUMNS // in_block
    values = blocks.contiguous().view(dtype)
    axes = values.view(-1, tiles.column_blocks(ic), tiles.UNIT_ROWS // tiles.ROWS, in_block, tiles.ROWS)
    pieces = axes.permute(0, 2, 4, 1, 3).reshape(tiles.row_blocks(oc) * tiles.ROWS, -1)[:oc, : ic // piece]
    return pieces[:, :: group_size // piece].contiguous()
