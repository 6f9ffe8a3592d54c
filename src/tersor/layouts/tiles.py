"""Kernel tiles: the packed codes in the order in which the tensor cores' lanes read them.

A block is 16 output rows by 128 input channels. Lane l = 4 g + t holds, for each of the block's eight k16 steps, the
A fragment of mma.m16n8k16 (PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16"): four registers of two weights, rows g
and g + 8, channels 2t, 2t+1 and 2t+8, 2t+9. For 8-bit activations a register holds four weights instead and the block
has four k32 steps: the A fragment of wgmma m64nNk32 (PTX ISA 9.0, "Register Fragments for wgmma.mma_async.m64nNk32"),
rows g and g + 8, channels 4t to 4t+3 and 4t+16 to 4t+19. These 32 or 16 registers are packed, a decode group at a
time, into 2 * bits words by the linear map of `lanes`. Words are stored in planes of four for each lane, an odd width
ends with a plane of two, so that a warp's loads are contiguous. Four blocks, 64 rows, make a unit: what a warpgroup
multiplies at a time. Units follow each other along IC, then along OC; OC is padded to 64 and IC to 128 with codes of
zero.

Layout names are `tiles_float16`, `tiles_bfloat16` and `tiles_float8_e4m3fn`, after the dtype of the activations: the
tables differ with it.
"""

from __future__ import annotations

import torch

from tersor.formats import ElementFormat
from tersor.layouts import decode_groups
from tersor.layouts.decode_groups import DecodeGroup

ROWS = 16
COLUMNS = 128
UNIT_ROWS = 64
_UNIT_BLOCKS = UNIT_ROWS // ROWS
_LANES = 32
_CHUNK_BLOCKS = 1 << 14
"""Blocks packed at a time: bounds the scratch memory to about 1 GB of int32 registers."""

LAYOUTS = {f"tiles_{target}": target for target in decode_groups.TARGETS}
"""Layout name -> decode target."""


def row_blocks(oc: int) -> int:
    """Return how many blocks hold `oc` rows, whole units of four."""
    return -(-oc // UNIT_ROWS) * _UNIT_BLOCKS


def column_blocks(ic: int) -> int:
    """Return how many blocks cover `ic` channels."""
    return -(-ic // COLUMNS)


def pack(codes: torch.Tensor, fmt: ElementFormat, target: str) -> torch.Tensor:
    """Pack codes into tiles.

    Args:
        codes: uint8 [OC, IC].
        fmt: their format.
        target: a key of `lanes.TARGETS`, the dtype of the activations.

    Returns:
        int32 [row blocks * column blocks * 64 * bits], flat, on the same device.
    """
    oc, ic = codes.shape
    group = decode_groups.decode_group(fmt, target)
    down, across = row_blocks(oc), column_blocks(ic)
    step = _chunk(across)
    chunks = []
    for first in range(0, down, step):
        rows = codes[first * ROWS : (first + step) * ROWS]
        chunks.append(_pack_rows(rows, across, fmt, target, group))
    return torch.cat(chunks) if len(chunks) > 1 else chunks[0]


def _chunk(across: int) -> int:
    """Return how many row blocks are packed at a time: whole units."""
    return max(1, _CHUNK_BLOCKS // across // _UNIT_BLOCKS) * _UNIT_BLOCKS


def _pack_rows(codes: torch.Tensor, across: int, fmt: ElementFormat, target: str, group: DecodeGroup) -> torch.Tensor:
    padding = (0, across * COLUMNS - codes.shape[1], 0, -codes.shape[0] % UNIT_ROWS)
    padded = torch.nn.functional.pad(codes, padding, value=fmt.zero_code)
    # With n weights in a register: row = 8 i + g, channel = 8 n step + 4 n half + n t + e; register 4 step + 2 half + i
    # of lane 4 g + t.
    together = decode_groups.weights_in_register(target)
    axes = padded.view(-1, 2, 8, across, COLUMNS // (8 * together), 2, 4, together)
    fragments = axes.permute(0, 3, 2, 6, 4, 5, 1, 7).to(torch.int32)
    joined = decode_groups.join(decode_groups.place(fragments, fmt, target))
    registers = joined.reshape(-1, _LANES, 2 * fmt.bits // group.words, group.registers)
    words = torch.zeros(*registers.shape[:3], group.words, dtype=torch.int32, device=codes.device)
    for index, sources in enumerate(decode_groups.packing(group)):
        for register, turn, mask in sources:
            words[..., index] ^= decode_groups.rotate(registers[..., register], turn) & decode_groups.signed(mask)
    lane_words = words.view(-1, _LANES, 2 * fmt.bits)
    quads = 2 * fmt.bits // 4 * 4
    planes = lane_words[..., :quads].unflatten(2, (quads // 4, 4)).transpose(1, 2).flatten(1)
    tail = lane_words[..., quads:].flatten(1)
    blocks = torch.cat((planes, tail), dim=1)
    return blocks.view(-1, _UNIT_BLOCKS, across, 64 * fmt.bits).transpose(1, 2).reshape(-1)


def unpack(tiles: torch.Tensor, fmt: ElementFormat, target: str, shape: tuple[int, int]) -> torch.Tensor:
    """Undo `pack`: return the uint8 codes [OC, IC]."""
    oc, ic = shape
    across = column_blocks(ic)
    group = decode_groups.decode_group(fmt, target)
    rows_of_blocks = tiles.view(row_blocks(oc), -1)
    step = _chunk(across)
    chunks = [
        _unpack_rows(rows_of_blocks[first : first + step], across, fmt, target, group)
        for first in range(0, row_blocks(oc), step)
    ]
    codes = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
    return codes[:oc, :ic].contiguous()


def _unpack_rows(tiles: torch.Tensor, across: int, fmt: ElementFormat, target: str, group: DecodeGroup) -> torch.Tensor:
    units = tiles.reshape(-1, across, _UNIT_BLOCKS, 64 * fmt.bits)
    blocks = units.transpose(1, 2).reshape(-1, 64 * fmt.bits)
    quads = 2 * fmt.bits // 4 * 4
    planes = blocks[:, : _LANES * quads].unflatten(1, (quads // 4, _LANES, 4)).transpose(1, 2).flatten(2)
    tail = blocks[:, _LANES * quads :].unflatten(1, (_LANES, 2 * fmt.bits - quads))
    words = torch.cat((planes, tail), dim=2).view(-1, _LANES, 2 * fmt.bits // group.words, group.words)
    mask = decode_groups.signed(group.mask)
    registers = []
    for sources in group.outputs():
        value = torch.zeros_like(words[..., 0])
        for word, turn in sources:
            value ^= decode_groups.rotate(words[..., word], turn)
        registers.append(value & mask)
    fields = decode_groups.split(torch.stack(registers, dim=-1), target)
    codes = decode_groups.unplace(fields, fmt, target).to(torch.uint8)
    together = fields.shape[-1]
    axes = codes.view(-1, across, 8, 4, COLUMNS // (8 * together), 2, 2, together).permute(0, 6, 2, 1, 4, 5, 3, 7)
    return axes.reshape(-1, across * COLUMNS)


def scales_in_block(group_size: int | None) -> int:
    """Return how many scales of one row a block carries; 0 for one scale a row.

    A group that is no divisor or multiple of 128 is cut into pieces that are: each piece carries the scale again.

    Raises:
        ValueError: the group size is not a multiple of 16, which the kernels' k16 steps need.
    """
    if group_size is None:
        return 0
    piece = _greatest_piece(group_size)
    if piece % 16:
        raise ValueError(f"group size {group_size} is not a multiple of 16")
    return COLUMNS // piece


def _greatest_piece(group_size: int) -> int:
    """Return the largest power of two that divides both the group and a block."""
    return min(group_size & -group_size, COLUMNS)
