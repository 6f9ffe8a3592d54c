"""Server-sent events, and clients that go away: what was begun for them ends at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tersor.server.errors import ApiError

T = TypeVar("T")
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
GONE = 499
"""Status of a request whose client went away, in our numbers only."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run work while a client is there.

    Raises:
        ApiError: status `GONE`: the client went away, and the work was cancelled and has ended.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(GONE, "the client went away")
    finally:
        for one in (watch, task):  # the work last: it may raise
            if not one.done():
                one.cancel()
                with suppress(asyncio.CancelledError):
                    await one


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(value: Any) -> bytes:
    """Return a value as one event."""
    return b"data: " + _ENCODER.encode(value).encode() + b"\n\n"


class EventStream(Response):
    """Events as they come, then `[DONE]`. An error before the first event has its status, a later one is an event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Any, None], told: Callable[[BaseException], ApiError]) -> None:
        """Make a response.

        Args:
            events: values that JSON can hold.
            told: what a client is told of an exception.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._told = events, told
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until there are no more or the client is gone."""
        with suppress(ApiError):
            await until_gone(receive, self._send(scope, receive, send))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async for value in self._events:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": event(value), "more_body": True})
        except Exception as error:
            told = self._told(error)
            if not started:
                await JSONResponse(told.body(), told.status, told.headers)(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": event(told.body()), "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
