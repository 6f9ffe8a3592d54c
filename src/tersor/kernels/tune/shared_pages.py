"""What does it cost that rows read the pages they begin with together, and what each by itself? Times of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from tersor.hardware import Chip
from tersor.kernels.attention import PAGE, SHARED_QUERIES, Kind

LEAST_ROWS = 4
"""Decoding rows of a step from which on it may pay."""

# Fitted to an H200 (bench/results/attention_groups_h200.json); other chips differ in bandwidth, operations and
# multiprocessors, which `Chip` knows.
_ACHIEVED = 0.878
"""Share of the datasheet's bandwidth that attention reaches where every page is read by one row."""
_AGAIN = 1.474
"""How much faster pages come that another row of the step has read, some of them from the L2 cache."""
_OPERATIONS = 0.2575
"""Share of the tensor cores' peak that 64 queries of a CTA reach."""
_PARTS = 0.1084
"""Share of the datasheet's bandwidth at which parts of rows are written, read and added."""
_LAUNCH = 1.05e-6
"""One more kernel: its start, its first pages and the end of its last CTA."""
_TURN = 1.15e-6
"""A page in a CTA that has no more of them under way than its ring holds."""
_CTAS_OF_SM = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedCosts:
    """Times of one layer on one chip.

    Attributes:
        rows: that read pages together in one CTA at most; less than 2 where none can.
        kv_heads: CTAs of an item.
        ctas: that run at once.
        page: a page of all heads, read by one row for itself.
        again: the same of a page that another row reads as well.
        tile: the same, read by a CTA of each head for all its rows.
        part: a part of a row, written and added to the others.
        launch: the kernel that reads for several rows.
        turn: a page in one CTA, however few others there are.
    """

    rows: int
    kv_heads: int
    ctas: int
    page: float
    again: float
    tile: float
    part: float
    launch: float
    turn: float


def shared_costs(kind: Kind, heads: int, kv_heads: int, chip: Chip) -> SharedCosts:
    """Return the costs of attention of `heads` and `kv_heads` heads on a chip."""
    token = 2 * kv_heads * (kind.head_dim * (1 if kind.e4m3 else 2) + (4 if kind.e4m3 else 0))
    page = token * PAGE / (_ACHIEVED * chip.bandwidth)
    operations = 4 * SHARED_QUERIES * PAGE * kind.head_dim * kv_heads
    return SharedCosts(
        rows=SHARED_QUERIES // (heads // kv_heads),
        kv_heads=kv_heads,
        ctas=_CTAS_OF_SM * chip.sms,
        page=page,
        again=page / _AGAIN,
        tile=max(page, operations / (_OPERATIONS * chip.fp16_ops)),
        part=8 * heads * (kind.head_dim + 2) / (_PARTS * chip.bandwidth),
        launch=_LAUNCH,
        turn=_TURN,
    )
