"""From a request to the engine and back: who may wait, and the answers of several prompts as they grow."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from tersor.engine.outputs import ERROR, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.protocol import AsyncEngine
from tersor.errors import TersorError
from tersor.server.errors import ApiError
from tersor.server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt of a request: its tokens, and how to answer it, or `None` for its last state."""

    tokens: list[int]
    params: SamplingParams | None
    salt: str | None = None


class Front:
    """Stands between requests and an engine: it refuses what cannot wait, and leaves nothing running behind.

    Attributes:
        queued: prompts that wait for their first token.
    """

    def __init__(self, engine: AsyncEngine, metrics: Metrics, max_queue: int) -> None:
        self.engine, self.metrics, self._max_queue = engine, metrics, max_queue
        self.queued = 0

    def check_queue(self, count: int = 1) -> None:
        """Refuse prompts that nobody could answer now.

        Raises:
            ApiError: 503 where the engine has failed, 429 where too many wait. A request of several prompts is let in
                whole, so a queue that is empty takes one of any size.
        """
        if not self.engine.healthy:
            raise ApiError(503, "the engine has failed: start the server again", code="engine_failed")
        if self.queued and self.queued + count > self._max_queue:
            message = f"{self.queued} prompts wait and {self._max_queue} may: try again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})

    @asynccontextmanager
    async def answering(self, jobs: Sequence[Job]) -> AsyncIterator[AsyncGenerator[tuple[int, RequestOutput], None]]:
        """Have prompts answered; on leaving the block, whatever has not ended is aborted.

        The block gets (prompt, what there is of its answers so far) as they grow; of several prompts a slow reader
        sees the latest. What it iterates raises TersorError: what the engine raised, or why it gave a prompt up.

        Raises:
            ApiError: as `check_queue`.
        """
        self.check_queue(len(jobs))
        runs = [_Run(self, job) for job in jobs]
        outputs = _alone(runs[0]) if len(runs) == 1 else _together(runs)
        try:
            yield outputs
        finally:
            await outputs.aclose()
            for run in runs:
                await run.end()


class _Run:
    """One prompt in the engine, and the times of its tokens."""

    def __init__(self, front: Front, job: Job) -> None:
        self._front, self._job = front, job
        self._name = f"req-{uuid.uuid4().hex}"
        self._waits, self._finished = True, False
        front.queued += 1

    async def outputs(self) -> AsyncGenerator[RequestOutput, None]:
        """Yield what there is of the answers, until they are finished."""
        front, job = self._front, self._job
        begun = last = time.perf_counter()
        tokens = 0
        generated = front.engine.generate(job.tokens, job.params, request_id=self._name, salt=job.salt)
        async for output in generated:
            count = sum([len(one.token_ids) for one in output.outputs])
            if count > tokens:
                now = time.perf_counter()
                if self._waits:
                    self._leave_queue()
                    front.metrics.first.observe(now - begun)
                else:
                    rows = max(1, sum([one.finish_reason is None for one in output.outputs]))
                    front.metrics.next.observe((now - last) * rows / (count - tokens), count - tokens)
                last, tokens = now, count
            self._finished = output.finished
            if output.error is not None or any(one.finish_reason == ERROR for one in output.outputs):
                raise TersorError(output.error or "the engine ended the request with an error")
            yield output
        if not self._finished:
            raise TersorError("the engine left a request without an end")

    async def end(self) -> None:
        """Leave nothing behind."""
        if self._waits:
            self._leave_queue()
        if not self._finished:
            await self._front.engine.abort(self._name)

    def _leave_queue(self) -> None:
        self._waits = False
        self._front.queued -= 1


async def _alone(run: _Run) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    outputs = run.outputs()
    try:
        async for output in outputs:
            yield 0, output
    finally:
        await outputs.aclose()


async def _together(runs: Sequence[_Run]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Merge the outputs of several prompts; the first error ends all."""
    latest: dict[int, RequestOutput] = {}
    errors: list[Exception] = []
    news = asyncio.Event()

    async def follow(index: int, run: _Run) -> None:
        try:
            async for output in run.outputs():
                latest[index] = output
                news.set()
        except Exception as error:
            errors.append(error)
        news.set()

    tasks = [asyncio.create_task(follow(index, run)) for index, run in enumerate(runs)]
    try:
        while latest or errors or not all(task.done() for task in tasks):
            if latest:
                index = next(iter(latest))
                yield index, latest.pop(index)
            elif errors:
                raise errors[0]
            else:
                news.clear()
                await news.wait()
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
