"""Rows of several weights in one: stacked, or gate and up interleaved as a gated linear reads them. Each can be undone.

A gated weight has blocks of 16 rows: eight gate rows, then the eight up rows of the same output channels. So the two
rows that one lane of a tensor core's fragment holds (`layouts.tiles`) are gate and up of one channel. Where the number
of channels F is no multiple of 8, the last block has F % 8 gate rows, rows of zeros up to eight, and F % 8 up rows: F
follows from the rows.
"""

from __future__ import annotations

import torch

from tersor.errors import ShapeError

HALF = 8
"""Rows of the gate, and of the up, in a block."""


def gated_rows(channels: int) -> int:
    """Return the rows of a gated weight of so many output channels."""
    full, rest = divmod(channels, HALF)
    return 2 * HALF * full + (HALF + rest if rest else 0)


def gated_channels(rows: int) -> int:
    """Return the output channels of a gated weight of so many rows.

    Raises:
        ShapeError: no gated weight has so many rows.
    """
    full, rest = divmod(rows, 2 * HALF)
    channels = HALF * full + max(0, rest - HALF)
    if gated_rows(channels) != rows:
        raise ShapeError(f"a weight of {rows} rows is no gated one: make it with PackedWeight.gate_up")
    return channels


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Interleave the rows of two tensors [F, ...] of one shape and dtype: returns [gated_rows(F), ...]."""
    full, rest = divmod(gate.shape[0], HALF)
    whole = HALF * full
    blocks = torch.stack((gate[:whole].unflatten(0, (full, HALF)), up[:whole].unflatten(0, (full, HALF))), dim=1)
    parts = [blocks.flatten(0, 2)]
    if rest:
        parts += [gate[whole:], gate.new_zeros(HALF - rest, *gate.shape[1:]), up[whole:]]
    return torch.cat(parts)


def separate(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `interleave`: return gate and up, each [F, ...]."""
    full, rest = divmod(both.shape[0], 2 * HALF)
    whole = 2 * HALF * full
    blocks = both[:whole].unflatten(0, (full, 2, HALF))
    gate, up = blocks[:, 0].flatten(0, 1), blocks[:, 1].flatten(0, 1)
    if rest:
        gate = torch.cat((gate, both[whole : whole + rest - HALF]))
        up = torch.cat((up, both[whole + HALF :]))
    return gate, up
