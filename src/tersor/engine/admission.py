"""Who gets pages next? The queues of requests without any, and whether the first of them may begin.

A request whose next page another is computing waits for it instead of computing it too. It waits for the last page that
both begin with, and only ever for a later one than before, so it comes to an end. Who was preempted is before everybody
else and does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tersor.engine import prefix
from tersor.engine.prefix import PrefixCache
from tersor.engine.request import DELAYED, PREEMPTED, WAITING, Request
from tersor.engine.waiting import Waiting
from tersor.errors import TersorError

DELAYS = 32
"""Requests that are put aside, to wait for another's pages, before one may begin: at most so many are digested."""


class Admission:
    """Requests that have no pages.

    Attributes:
        waiting: those that have not begun.
        preempted: those that have, which go first.
        may_return: whether one of them may have pages now, where there are some, so many of which it finds; it is not
            asked where nobody has any.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self.waiting = Waiting()
        self.preempted = Waiting()
        self.may_return: Callable[[Request, int], bool] = whenever
        self._cache = cache
        self._size = cache.pages.size
        self._computing: dict[bytes, Request] = {}
        self._delayed: dict[bytes, list[Request]] = {}
        self._delays = 0  # requests in the lists above

    def __len__(self) -> int:
        return len(self.waiting) + len(self.preempted) + self._delays

    def add(self, request: Request) -> None:
        """Put a request in its place among those that wait; it has no pages."""
        if request.state == PREEMPTED:
            self.preempted.push(request)
        else:
            request.state = WAITING
            self.waiting.push(request)

    def remove(self, request: Request) -> None:
        """Forget a request that waits."""
        if request.state == DELAYED:
            for name, delayed in list(self._delayed.items()):
                if request in delayed:
                    delayed.remove(request)
                    self._delays -= 1
                    if not delayed:
                        del self._delayed[name]
        else:
            (self.preempted if request.state == PREEMPTED else self.waiting).remove(request)

    def next(self, reserved: int, *, alone: bool) -> tuple[Request, list[int]] | None:
        """Return the request that may begin now and the pages that it finds, or `None`.

        Args:
            reserved: pages that are left for those who have some and are expected to need more.
            alone: nobody has pages, so the first one has to begin: it takes what is pinned too.
        """
        for _ in range(DELAYS):
            queue = self.preempted if self.preempted else self.waiting
            request = queue.head()
            if request is None or request.in_flight:
                return None
            found = self._find(request)
            if queue is self.waiting and self._wait(request, len(found)):
                continue
            fits = alone or (
                self._fits(request, found, reserved) and (queue is self.waiting or self.may_return(request, len(found)))
            )
            return (request, found) if fits else None
        return None

    def begin(self, request: Request, found: list[int]) -> None:
        """Take a request out of its queue and say which pages of its prompt it computes."""
        self.remove(request)
        whole = len(request.prompt) // self._size
        for name in self._digests(request, whole, first=len(found)):
            if name not in self._cache and name not in self._computing:
                self._computing[name] = request
                request.announced.append(name)

    def publish(self, request: Request, tokens: int) -> None:
        """Let the full pages of the first `tokens` tokens, all computed and read, be found by others."""
        first = request.publish_at // self._size - 1
        for place, name in enumerate(self._digests(request, tokens // self._size, first=first), first):
            self._cache.publish(name, request.pages[place])
            self._wake(name)
        request.publish_at = (tokens // self._size + 1) * self._size

    def withdraw(self, request: Request) -> None:
        """Let nobody wait any more for pages that a request will not compute now."""
        for name in request.announced:
            if self._computing.get(name) is request:
                self._wake(name)
        request.announced.clear()

    def audit(self) -> None:
        """Check that who waits, waits for something."""
        for queue, state in ((self.waiting, WAITING), (self.preempted, PREEMPTED)):
            for request in queue:
                if request.state != state:
                    raise TersorError(f"{request.id} is {request.state} in the queue of those {state}")
        if self._delays != sum(map(len, self._delayed.values())):
            raise TersorError("delayed requests are not counted right")
        for name, delayed in self._delayed.items():
            for request in delayed:
                if name not in self._computing or request.state != DELAYED:
                    raise TersorError(f"{request.id} is {request.state} and waits for a page that nobody computes")
        for name, request in self._computing.items():
            if name in self._cache or name not in request.announced or not request.pages:
                raise TersorError(f"{request.id} does not compute what others wait for")

    def everybody(self) -> Iterator[Request]:
        """Yield every request without pages."""
        yield from self.waiting
        yield from self.preempted
        for delayed in self._delayed.values():
            yield from delayed

    def _digests(self, request: Request, end: int, first: int = 0) -> Iterable[bytes]:
        """Yield the digests of full pages `first` to `end`, the last left out, computing them as far as they go."""
        digests, size = request.digests, self._size
        for place in range(first, end):
            while len(digests) <= place:
                begin = len(digests) * size
                before = digests[-1] if digests else request.root
                digests.append(prefix.digest(before, request.tokens(begin, begin + size)))
            yield digests[place]

    def _sharable(self, request: Request) -> int:
        """Pages that a request can take from others: its last token, and those with wanted logits, are computed."""
        last = request.length - 1
        return (last if request.logits_from is None else min(last, request.logits_from)) // self._size

    def _find(self, request: Request) -> list[int]:
        return self._cache.find(self._digests(request, self._sharable(request)))

    def _wait(self, request: Request, found: int) -> bool:
        """Whether a request was put aside until another has computed pages that both begin with."""
        name = None
        for place, one in enumerate(self._digests(request, self._sharable(request), first=found), found + 1):
            if one not in self._computing:
                break
            if place > request.waited_for:
                name, depth = one, place
        if name is None:
            return False
        request.waited_for = depth
        self.waiting.remove(request)
        request.state = DELAYED
        self._delayed.setdefault(name, []).append(request)
        self._delays += 1
        return True

    def _wake(self, name: bytes) -> None:
        """Put those who wait for a page back into the queue: it is there, or nobody computes it."""
        self._computing.pop(name, None)
        for request in self._delayed.pop(name, ()):
            self._delays -= 1
            self.add(request)

    def _fits(self, request: Request, found: list[int], reserved: int) -> bool:
        """Whether there are pages for the text so far, beside those reserved and what it is expected to need itself."""
        cache, held = self._cache, self._cache.pages.needed(request.length)
        left = cache.available - cache.unheld(found) - (held - len(found))
        return left >= growth(request, held) + reserved


def whenever(request: Request, found: int) -> bool:
    """Let a request that was preempted go on as soon as there are pages."""
    return True


def growth(request: Request, held: int) -> int:
    """Return how many more pages a request that holds so many is expected to take: one where nothing is known."""
    return max(min(request.most_pages, max(request.expected_pages, held + 1)) - held, 0)
