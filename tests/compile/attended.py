"""Which kernels of attention do the compile tests build? Heads of every size and kind of pages, by turns."""

from __future__ import annotations

from tersor.hardware import Chip
from tersor.kernels import attention, attention_sm90, shared_attention
from tersor.kernels.attention import Kind
from tersor.kernels.decode_attention import decode_source
from tersor.kernels.jit import KernelSource

USUAL_HEADS = (Kind(head_dim=128, dtype="float16"),)
HEADS = (
    Kind(head_dim=64, dtype="bfloat16"),
    Kind(head_dim=80, dtype="float16", e4m3=True),
    Kind(head_dim=96, dtype="bfloat16"),
    Kind(head_dim=128, dtype="bfloat16", e4m3=True),
    Kind(head_dim=256, dtype="float16"),
    Kind(head_dim=256, dtype="bfloat16", e4m3=True),
)
"""What attention is built for: of the usual heads all kernels, of the others half of them on sm_80 and on sm_90."""
LARGEST_HEADS = (HEADS[3], HEADS[4])
"""Elsewhere all kernels of these: pages in e4m3, and the most shared memory."""


def sources(chip: Chip, kinds: tuple[Kind, ...]) -> list[KernelSource]:
    """Return kernels of attention: fewest and most queries of a row of few tokens, both for many, and pages shared."""
    found = []
    for turn, kind in enumerate(kinds):
        least, most = 1, kind.query_tiles(64)
        found += [decode_source(kind, tiles, chip) for tiles in (least, most)]
        found += [attention.append_source(kind), attention.prefill_source(kind, chip)]
        found.append(shared_attention.shared_source(kind, chip))
        found += [decode_source(kind, least, chip, crowded=True)] if kind.e4m3 else []
        if turn % 3 == 0:
            found += [decode_source(kind, tiles, chip, shares=True) for tiles in (least, most)]
        if attention_sm90.takes(kind, chip):
            found.append(attention_sm90.prefill_source(kind, chip))
    return found
