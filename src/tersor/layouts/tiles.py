"""Kernel tiles: the packed codes in the order in which the tensor cores' lanes read them.

A block is 16 output rows by 128 input channels. Lane l = 4 g + t holds, for each of the block's eight k16 steps, the
A fragment of mma.m16n8k16 (PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16"): four registers of two weights, rows g
and g + 8, channels 2t, 2t+1 and 2t+8, 2t+9. For 8-bit activations a register holds four weights instead and the block
has four k32 steps: the A fragment of wgmma m64nNk32 (PTX ISA 9.0, "Register Fragments for wgmma.mma_async.m64nNk32"),
rows g and g + 8, channels 4t to 4t+3 and 4t+16 to 4t+19. Of codes that choose from tables a register holds all eight
of a k16 step, those of row g first. These 32, 16 or 8 registers are packed, a decode group at a time, into 2 * bits
words by the linear map of `lanes`. Words are stored in planes of four for each lane, an odd width ends with a plane of
two, so that a warp's loads are contiguous. Four blocks, 64 rows, make a unit: what a warpgroup multiplies at a time.
Units follow each other along IC, then along OC; OC is padded to 64 and IC to 128 with codes of zero.
"""

from __future__ import annotations

import torch

from tersor.layouts import decode_groups
from tersor.layouts.blocks import BLOCK_IC, BLOCK_OC, UNIT_BLOCKS, UNIT_OC, ic_blocks, oc_blocks
from tersor.layouts.packing import Packing

_LANES = 32
_CHUNK_BLOCKS = 1 << 14
"""Blocks packed at a time: bounds the scratch memory to about 1 GB of int32 registers."""


def pack(codes: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Pack codes into tiles.

    Args:
        codes: uint8 [OC, IC].
        packing: their format, and what decodes them.

    Returns:
        int32 [`packing.words`], flat, on the same device.
    """
    oc, ic = codes.shape
    down, across = oc_blocks(oc), ic_blocks(ic)
    step = _chunk(across)
    chunks = []
    for first in range(0, down, step):
        rows = codes[first * BLOCK_OC : (first + step) * BLOCK_OC]
        chunks.append(_pack_rows(rows, across, packing))
    return torch.cat(chunks) if len(chunks) > 1 else chunks[0]


def _chunk(across: int) -> int:
    """Return how many row blocks are packed at a time: whole units."""
    return max(1, _CHUNK_BLOCKS // across // UNIT_BLOCKS) * UNIT_BLOCKS


def _pack_rows(codes: torch.Tensor, across: int, packing: Packing) -> torch.Tensor:
    fmt, target, group = packing.scheme.format, packing.target, packing.group
    padding = (0, across * BLOCK_IC - codes.shape[1], 0, -codes.shape[0] % UNIT_OC)
    padded = torch.nn.functional.pad(codes, padding, value=fmt.zero_code)
    # With n weights in a register: row = 8 i + g, channel = 8 n step + 4 n half + n t + e; register 4 step + 2 half + i
    # of lane 4 g + t.
    together = decode_groups.weights_in_register(target)
    axes = padded.view(-1, 2, 8, across, BLOCK_IC // (8 * together), 2, 4, together)
    fragments = axes.permute(0, 3, 2, 6, 4, 5, 1, 7).to(torch.int32)
    if group.spread > 1:  # one register a step: half and e of row i = 0, then those of row 1
        fragments = fragments.transpose(5, 6).flatten(5)
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
    return blocks.view(-1, UNIT_BLOCKS, across, 64 * fmt.bits).transpose(1, 2).reshape(-1)


def unpack(tiles: torch.Tensor, packing: Packing, shape: tuple[int, int]) -> torch.Tensor:
    """Undo `pack`: return the uint8 codes [OC, IC]."""
    oc, ic = shape
    across = ic_blocks(ic)
    rows_of_blocks = tiles.view(oc_blocks(oc), -1)
    step = _chunk(across)
    chunks = [
        _unpack_rows(rows_of_blocks[first : first + step], across, packing) for first in range(0, oc_blocks(oc), step)
    ]
    codes = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
    return codes[:oc, :ic].contiguous()


def _unpack_rows(tiles: torch.Tensor, across: int, packing: Packing) -> torch.Tensor:
    fmt, target, group = packing.scheme.format, packing.target, packing.group
    units = tiles.reshape(-1, across, UNIT_BLOCKS, 64 * fmt.bits)
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
    together = decode_groups.weights_in_register(target)
    fields = decode_groups.split(torch.stack(registers, dim=-1), together * group.spread)
    if group.spread > 1:
        fields = fields.unflatten(-1, (2, 2, together)).transpose(-3, -2)
    codes = decode_groups.unplace(fields, fmt, target).to(torch.uint8)
    axes = codes.view(-1, across, 8, 4, BLOCK_IC // (8 * together), 2, 2, together).permute(0, 6, 2, 1, 4, 5, 3, 7)
    return axes.reshape(-1, across * BLOCK_IC)
