"""How does an engine that serves single requests answer a batch? In the plan's order, admitted by predicted memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from tersor.engine import groups
from tersor.engine.batch_items import Item
from tersor.engine.dispatch import expected_output
from tersor.engine.forecast import Admission, OutputLengths
from tersor.engine.openai_answer import Embedded
from tersor.engine.outputs import RequestOutput
from tersor.engine.params import SamplingParams
from tersor.errors import InputError, TersorError

_LOOK = 0.1
"""Seconds between two looks at whether to stop, where nothing finishes."""


class AsyncEngine(Protocol):
    """What is asked of an engine."""

    def generate(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, *, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        """Yield a request's output as it grows; the last one is finished.

        Raises:
            TersorError: this request cannot be answered.
        """

    async def abort(self, request_id: str) -> None:
        """End a request; one that is not there is no error."""


class PlannedEngine:
    """A `BatchEngine` over an engine that takes one request at a time. Its requests run in an event loop of its own.

    Requests of a prefix are begun one after the other, so that an engine with a cache of prefixes finds it there; so
    many run as are expected to fit in its pages together, whatever each will draw.
    """

    def __init__(
        self, engine: AsyncEngine, *, pages: int, context: int, most_running: int, page: int = groups.PAGE
    ) -> None:
        """Take an engine.

        Args:
            engine: answers requests.
            pages: that it has for keys and values.
            context: tokens that a request may have.
            most_running: requests that it runs at a time.
            page: tokens of a page.
        """
        self._engine, self._pages, self._context = engine, pages, context
        self._most_running, self._page = most_running, page
        self._lengths = OutputLengths()

    def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[RequestOutput | Embedded]:
        """Yield the outputs of all items, in the order in which they finish.

        Raises:
            InputError: an item asks for its last state.
            TersorError: the engine fails.
        """
        if any(item.params is None for item in items):
            raise InputError("this engine makes no embeddings: it draws tokens")
        loop = asyncio.new_event_loop()
        job = _Run(self._engine, items, self._admission(items), self._most_running)
        try:
            while outputs := loop.run_until_complete(job.step(stopping)):
                yield from (output for output in outputs if output is not None)
        finally:
            loop.run_until_complete(job.close())
            loop.close()

    def _admission(self, items: Sequence[Item]) -> tuple[groups.Plan, Admission]:
        most = [self._most(item) for item in items]
        expected = [min(limit, expected_output(item)) for limit, item in zip(most, items, strict=True)]
        plan = groups.plan([item.tokens for item in items], expected, page=self._page)
        limits = np.array(most, dtype=np.int64)[plan.order]
        return plan, Admission(plan, self._pages, limits, self._lengths)

    def _most(self, item: Item) -> int:
        """Tokens that an item may draw, of all its continuations."""
        room = max(1, self._context - item.tokens.size)
        return 1 if item.params is None else item.params.n * min(room, item.params.max_tokens or room)


class _Run:
    """The requests of one batch that run."""

    def __init__(
        self, engine: AsyncEngine, items: Sequence[Item], planned: tuple[groups.Plan, Admission], most_running: int
    ) -> None:
        self._engine, self._items, self._most_running = engine, items, most_running
        (self._plan, self._admission), self._next = planned, 0
        self._tasks: dict[asyncio.Task[RequestOutput], int] = {}

    async def step(self, stopping: Callable[[], bool]) -> list[RequestOutput | None]:
        """Begin what fits and return what finished since, `None` where nothing did; empty at the end."""
        while self._next < self._plan.order.size and not stopping() and self._room():
            task = asyncio.ensure_future(self._answer(self._next))
            self._tasks[task] = self._next
            self._admission.admit(self._next)
            self._next += 1
        if not self._tasks:
            return []
        done, _ = await asyncio.wait(self._tasks, timeout=_LOOK, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            self._admission.end(self._tasks.pop(task))
        return [task.result() for task in done] or [None]

    async def close(self) -> None:
        """Abort what still runs."""
        for task, position in self._tasks.items():
            task.cancel()
            await self._engine.abort(self._item(position).key)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _room(self) -> bool:
        running = len(self._tasks)
        return not running or (running < self._most_running and self._admission.fits(self._next))

    def _item(self, position: int) -> Item:
        return self._items[int(self._plan.order[position])]

    async def _answer(self, position: int) -> RequestOutput:
        item, drawn = self._item(position), 0
        tokens = item.tokens.tolist()
        assert item.params is not None
        output = RequestOutput(item.key, None, tokens, [], error="the engine gave no answer")
        try:
            async for output in self._engine.generate(tokens, item.params, request_id=item.key):
                now = sum(len(one.token_ids) for one in output.outputs)
                self._admission.drew(position, now - drawn)
                drawn = now
        except TersorError as error:
            return RequestOutput(item.key, None, tokens, [], error=str(error))
        return output
