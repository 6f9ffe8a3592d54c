"""Kernel tiles: how large blocks and units are, and how many cover a weight."""

from __future__ import annotations

BLOCK_OC = 16
"""Output channels (rows) of a block."""
BLOCK_IC = 128
"""Input channels of a block."""
UNIT_OC = 64
"""Output channels of a unit: the blocks that a warpgroup multiplies at a time, one below the other."""
UNIT_BLOCKS = UNIT_OC // BLOCK_OC


def oc_blocks(oc: int) -> int:
    """Return how many blocks hold `oc` output channels, whole units of four."""
    return -(-oc // UNIT_OC) * UNIT_BLOCKS


def ic_blocks(ic: int) -> int:
    """Return how many blocks cover `ic` input channels."""
    return -(-ic // BLOCK_IC)
