"""Which pages are free, and how many requests hold each of the others?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from tersor.errors import InputError, TersorError


class Pages:
    """Counts the holders of every page. Page 0 is never handed out: padding is pointed at it.

    A page is free, held by somebody, or idle: held by nobody and not free, since what is in it may be wanted again.

    Attributes:
        size: tokens of a page.
        usable: pages that can be handed out, one less than there are.
        holders: of every page, how many requests hold it.
    """

    def __init__(self, count: int, size: int) -> None:
        if count < 2 or size < 1:
            raise InputError(f"there are {count} pages of {size} tokens: at least 2 of at least 1 token are needed")
        self.size = size
        self.usable = count - 1
        self.holders = [0] * count
        self._free = list(range(count - 1, 0, -1))

    @property
    def free(self) -> int:
        """Pages that are free."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Return how many pages so many tokens fill."""
        return -(-tokens // self.size)

    def take(self) -> int:
        """Return a page that was free; whoever calls holds it."""
        page = self._free.pop()
        self.holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Count one more holder of a page that is held or idle."""
        self.holders[page] += 1

    def drop(self, page: int) -> bool:
        """Count one holder less; return whether nobody holds the page now, which is then idle."""
        holders = self.holders[page] - 1
        if holders < 0:
            raise TersorError(f"page {page} is given back though nobody holds it")
        self.holders[page] = holders
        return holders == 0

    def free_again(self, page: int) -> None:
        """Make an idle page free."""
        self._free.append(page)

    def audit(self, held: Iterable[int], idle: Collection[int]) -> None:
        """Check every page against the holders' own lists, one entry a holder, and the idle pages."""
        counts = Counter(held)
        free = set(self._free)
        if len(free) != len(self._free):
            raise TersorError("a page is free twice")
        if 0 in free or 0 in counts or 0 in idle:
            raise TersorError("page 0 was handed out")
        if len(free) + len(counts) + len(idle) != self.usable:
            raise TersorError(f"{len(free)} free, {len(counts)} held, {len(idle)} idle of {self.usable} pages")
        if len(free.union(counts, idle)) != self.usable:
            raise TersorError("a page is in two places")
        for page, count in enumerate(self.holders):
            if count != counts.get(page, 0):
                raise TersorError(f"page {page} counts {count} holders, and {counts[page]} hold it")
