"""From a request to the engine and back: who may wait, and the answers of several prompts as they grow."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from tersor.engine.outputs import ERROR, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.protocol import AsyncEngine
from tersor.errors import TersorError
from tersor.server.errors import ApiError
from tersor.server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt of a request: its tokens and how to answer it."""

    tokens: list[int]
    params: SamplingParams
    salt: str | None = None


@dataclass
class Answers:
    """The answers to the prompts of one request, which ends with the block that opened it.

    Attributes:
        ids: the engine's names of the prompts.
    """

    ids: list[str]
    _latest: dict[int, RequestOutput] = field(default_factory=dict)
    _open: set[int] = field(default_factory=set)
    _error: BaseException | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yield (prompt, what there is of its answers so far); a slow reader skips to the latest.

        Raises:
            TersorError: what the engine raised, or why it could not go on with a prompt.
        """
        while self._open or self._latest or self._error:
            if not self._latest:
                if self._error is not None:
                    raise self._error
                self._news.clear()
                await self._news.wait()
                continue
            index = next(iter(self._latest))
            output = self._latest.pop(index)
            if output.error is not None or any(one.finish_reason == ERROR for one in output.outputs):
                raise TersorError(output.error or "the engine ended the request with an error")
            yield index, output


class Front:
    """Stands between requests and an engine: it refuses what cannot wait, and leaves nothing running behind.

    Attributes:
        queued: prompts that wait for their first token.
    """

    def __init__(self, engine: AsyncEngine, metrics: Metrics, max_queue: int) -> None:
        self._engine, self._metrics, self._max_queue = engine, metrics, max_queue
        self.queued = 0

    def check_queue(self, count: int = 1) -> None:
        """Refuse prompts that nobody could answer now.

        Raises:
            ApiError: 503 where the engine has failed, 429 where too many wait. A request of several prompts is let in
                whole, so a queue that is empty takes one of any size.
        """
        if not self._engine.healthy:
            raise ApiError(503, "the engine has failed: start the server again", code="engine_failed")
        if self.queued and self.queued + count > self._max_queue:
            message = f"{self.queued} prompts wait and {self._max_queue} may: try again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})

    @asynccontextmanager
    async def answering(self, jobs: Sequence[Job]) -> AsyncIterator[Answers]:
        """Have prompts answered; on leaving the block, whatever has not ended is aborted.

        Raises:
            ApiError: as `check_queue`.
        """
        self.check_queue(len(jobs))
        answers = Answers([f"req-{uuid.uuid4().hex}" for _ in jobs])
        answers._open.update(range(len(jobs)))
        self.queued += len(jobs)
        tasks = [asyncio.create_task(self._pump(answers, index, job)) for index, job in enumerate(jobs)]
        try:
            yield answers
        finally:
            for name, task in zip(answers.ids, tasks, strict=True):
                if not task.done():
                    await asyncio.shield(self._engine.abort(name))
                    task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task

    async def _pump(self, answers: Answers, index: int, job: Job) -> None:
        """Keep the latest output of a prompt, and the times of its tokens."""
        begun = last = time.perf_counter()
        waits, tokens, finished = True, 0, False
        try:
            generated = self._engine.generate(job.tokens, job.params, request_id=answers.ids[index], salt=job.salt)
            async for output in generated:
                now = time.perf_counter()
                count = sum(len(one.token_ids) for one in output.outputs)
                if waits and count:
                    waits = False
                    self.queued -= 1
                    self._metrics.first.observe(now - begun)
                elif count > tokens:
                    rows = max(1, sum(one.finish_reason is None for one in output.outputs))
                    self._metrics.next.observe((now - last) * rows / (count - tokens), count - tokens)
                last, tokens = (now, count) if count > tokens else (last, tokens)
                finished = output.finished
                answers._latest[index] = output
                answers._news.set()
            if not finished:
                raise TersorError("the engine left a request without an end")
        except asyncio.CancelledError:
            raise
        except Exception as error:
            answers._error = answers._error or error
        finally:
            if waits:
                self.queued -= 1
            answers._open.discard(index)
            answers._news.set()
