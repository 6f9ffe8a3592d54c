"""The newest word about each open request, for the coroutine that waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from tersor.engine.outputs import RequestOutput
from tersor.errors import InputError


class Box:
    """The newest word about one request; a reader that is slow sees fewer of them, and nobody waits for it."""

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self._latest: RequestOutput | Exception | None = None

    def put(self, latest: RequestOutput | Exception) -> None:
        """Put the newest word in, in the reader's event loop."""
        self._latest = latest
        self._news.set()

    async def next(self) -> RequestOutput:
        """Wait for a word that was not read yet; an exception is raised."""
        await self._news.wait()
        self._news.clear()
        latest = self._latest
        if isinstance(latest, Exception):
            raise latest
        assert latest is not None
        return latest


class Boxes:
    """Those of all open requests."""

    def __init__(self) -> None:
        self._boxes: dict[str, Box] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._boxes))

    def open(self, request_id: str) -> Box:
        """Return the box of a new request.

        Raises:
            InputError: one of this name is open.
        """
        if request_id in self._boxes:
            raise InputError(f"request {request_id!r} is open already")
        box = self._boxes[request_id] = Box()
        return box

    def close(self, request_id: str) -> None:
        """Forget a request."""
        self._boxes.pop(request_id, None)

    def put(self, request_id: str, latest: RequestOutput | Exception) -> None:
        """Tell whoever waits for a request; nothing happens where nobody does."""
        box = self._boxes.get(request_id)
        if box is not None:
            box.put(latest)
