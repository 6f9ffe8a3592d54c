"""Which pages hold the beginning of a text already? Full pages, found by a digest of all that they depend on.

The digest of a page is SHA-256 over that of the page before it and its own tokens; the first goes on from a digest of
the salt. Equal digests therefore mean equal texts from the first token on, and nobody is served the text of another
salt. A page that nobody holds stays until its place is needed; the one that was released first goes first. Whoever
knows that a prefix will be wanted again pins it.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256

from tersor.engine.pages import Pages
from tersor.errors import TersorError


def root(salt: str | None) -> bytes:
    """Return what the first page's digest goes on from: `None` and the empty text are different salts."""
    return sha256(b"none" if salt is None else b"salt" + salt.encode("utf-8", "surrogatepass")).digest()


def root_of_one(number: int) -> bytes:
    """Return a root that no salt has, for requests that share with nobody but each other."""
    return sha256(b"one" + number.to_bytes(8, "little")).digest()


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """Return the digest of a full page: that of the page before it and its tokens, each below 2^32."""
    return sha256(before + array("I", tokens).tobytes()).digest()


class PrefixCache:
    """Hands out pages, and keeps those whose text may come again.

    Attributes:
        pages: whose only owner this is.
    """

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, held by nobody; the first is evicted first
        self._kept: OrderedDict[int, None] = OrderedDict()  # the same, pinned
        self._pins: Counter[bytes] = Counter()

    @property
    def available(self) -> int:
        """Pages that `take` can give without touching what is pinned."""
        return self.pages.free + len(self._idle)

    @property
    def pinned(self) -> int:
        """Pages that nobody holds and only a pin keeps."""
        return len(self._kept)

    @property
    def cached(self) -> int:
        """Pages that nobody holds and that can be found."""
        return len(self._idle) + len(self._kept)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._page_of

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Return the pages of the leading digests that are there. Nobody holds them for it."""
        found = []
        for one in digests:
            page = self._page_of.get(one)
            if page is None:
                break
            found.append(page)
        return found

    def take(self, count: int, *, pinned_too: bool = False) -> list[int]:
        """Return so many pages that nobody else holds; idle ones are evicted where free ones do not suffice.

        Args:
            count: pages wanted.
            pinned_too: whether pinned pages are evicted as well, after all others.

        Raises:
            TersorError: there are not so many.
        """
        there = self.available + (len(self._kept) if pinned_too else 0)
        if there < count:
            raise TersorError(f"{count} pages are wanted of {there}")
        taken = []
        for _ in range(count):
            if not self.pages.free:
                page, _ = (self._idle or self._kept).popitem(last=False)
                self._forget(page)
            taken.append(self.pages.take())
        return taken

    def hold(self, found: Iterable[int]) -> None:
        """Hold pages that were found."""
        for page in found:
            self.pages.hold(page)
            if self.pages.holders[page] == 1:
                del (self._idle if page in self._idle else self._kept)[page]

    def release(self, held: Sequence[int]) -> None:
        """Give pages of one text back, the last first, so that the end of a text is evicted before its beginning."""
        for page in reversed(held):
            if self.pages.drop(page):
                name = self._digest_of.get(page)
                if name is None:
                    self.pages.free_again(page)
                else:
                    (self._kept if name in self._pins else self._idle)[page] = None

    def publish(self, digest: bytes, page: int) -> None:
        """Let a full page that somebody holds be found; where there is one of this digest, that one stays."""
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def pin(self, digests: Iterable[bytes]) -> None:
        """Keep the pages of these digests, those that are to be computed yet as well, until `unpin`."""
        for one in digests:
            self._pins[one] += 1
            page = self._page_of.get(one, 0)
            if page in self._idle:
                del self._idle[page]
                self._kept[page] = None

    def unpin(self, digests: Sequence[bytes]) -> None:
        """Take one pin of each back. Pages that nobody holds, and no other pin keeps, are the next to be evicted.

        Raises:
            TersorError: one of them is not pinned.
        """
        for one in digests:
            if one not in self._pins:
                raise TersorError("a prefix is unpinned that is not pinned")
            self._pins[one] -= 1
            if self._pins[one]:
                continue
            del self._pins[one]
            page = self._page_of.get(one, 0)
            if page in self._kept:
                del self._kept[page]
                self._idle[page] = None
                self._idle.move_to_end(page, last=False)

    def unheld(self, found: Iterable[int]) -> int:
        """Return how many of these pages `take` could give to somebody else now."""
        return sum(page in self._idle for page in found)

    def audit(self, held: Iterable[int]) -> None:
        """Check pages and digests against the holders' own lists, one entry a holder."""
        if dict(zip(self._digest_of.values(), self._digest_of, strict=True)) != self._page_of:
            raise TersorError("a page is found by a digest that is not its own")
        idle = {*self._idle, *self._kept}
        if not idle <= self._digest_of.keys():
            raise TersorError("a page is idle and cannot be found")
        for page in idle:
            if (self._digest_of[page] in self._pins) != (page in self._kept):
                raise TersorError(f"page {page} is kept without a pin, or may be evicted with one")
        self.pages.audit(held, idle)

    def found_by_others(self, page: int) -> bool:
        """Whether a page was published, so that nobody may write to it."""
        return page in self._digest_of

    def _forget(self, page: int) -> None:
        del self._page_of[self._digest_of.pop(page)]
        self.pages.free_again(page)
