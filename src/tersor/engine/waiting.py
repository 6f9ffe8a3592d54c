"""Who is next? Requests that have no pages, in an order."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from tersor.engine.request import Request

Order = Callable[[Request], object]
"""What requests are sorted by, the least first; those that are equal in it go by arrival."""


def by_priority(request: Request) -> object:
    """Order by the number `priority`."""
    return request.priority


class Waiting:
    """A queue of requests in the order of `Request.order`, from which any can be taken."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[object, int], Request]] = []
        self._members: set[Request] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members)

    def push(self, request: Request) -> None:
        """Add a request."""
        self._members.add(request)
        heapq.heappush(self._heap, (request.order, request))

    def head(self) -> Request | None:
        """Return the first request, or `None`."""
        heap = self._heap
        while heap and heap[0][1] not in self._members:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def remove(self, request: Request) -> None:
        """Take a request out."""
        self._members.remove(request)
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapq.heapify(self._heap)
