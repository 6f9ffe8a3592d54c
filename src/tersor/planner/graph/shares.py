"""How much of a dimension has each rank? As much as any other, or one more: the first ranks have what is left over."""

from __future__ import annotations

UNEVEN = 1.5
"""How many times what ranks have on average the one with most may have: 25 heads on 8 ranks are 4 where 3.1 is even."""


def span(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return where a rank's part of a size begins, and how long it is."""
    least, over = divmod(size, ranks)
    return rank * least + min(rank, over), least + (rank < over)


def largest(size: int, ranks: int) -> int:
    """Return the longest part of a size."""
    return -(-size // ranks)


def fits(size: int, ranks: int) -> bool:
    """Whether a size may be cut among ranks: every rank has some of it, and none much more than the others."""
    return size % ranks == 0 or (size > ranks and largest(size, ranks) * ranks <= UNEVEN * size)
