"""An engine in a thread of its own, asked from an event loop: `protocol.AsyncEngine` over `core.Core`.

The thread alone touches the core. Requests go to it by a queue, outputs come back once a step, of every request the
newest: a reader that is slow sees fewer of them, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from tersor.engine.core import Core
from tersor.engine.outputs import RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.protocol import ModelInfo
from tersor.engine.stats import EngineStats
from tersor.errors import InputError, TersorError


class _Box:
    """The newest word about a request, for the coroutine that waits for it."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.latest: RequestOutput | Exception | None = None

    def put(self, latest: RequestOutput | Exception) -> None:
        self.latest = latest
        self.news.set()


class ThreadedEngine:
    """Answers many requests at once; see `protocol.AsyncEngine`, whose methods these are."""

    def __init__(self, core: Core, info: ModelInfo) -> None:
        self._core, self._info = core, info
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._boxes: dict[str, _Box] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tersor engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> ModelInfo:
        """The model."""
        return self._info

    @property
    def healthy(self) -> bool:
        """Whether steps still run."""
        return self._failure is None and not self._closing

    def stats(self) -> EngineStats:
        """Return how the engine stands."""
        return self._core.stats()

    def check_grammar(self, grammar: Mapping[str, Any]) -> None:
        """Compile a grammar of `SamplingParams`, or refuse it."""
        self._core.check_grammar(grammar)

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None,
        *,
        request_id: str,
        salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Answer one prompt."""
        self._check()
        if request_id in self._boxes:
            raise InputError(f"request {request_id!r} is open already")
        self._loop = asyncio.get_running_loop()
        box = self._boxes[request_id] = _Box()
        prompt = list(prompt_token_ids)
        self._jobs.put(lambda: self._add(request_id, prompt, params, salt))
        ended = False
        try:
            while not ended:
                await box.news.wait()
                box.news.clear()
                latest = box.latest
                if isinstance(latest, Exception):
                    ended = True
                    raise latest
                assert latest is not None
                ended = latest.finished
                yield latest
        finally:
            self._boxes.pop(request_id, None)
            if not ended:
                self._jobs.put(lambda: self._core.abort(request_id))

    async def abort(self, request_id: str) -> None:
        """End a request within a step."""
        self._jobs.put(lambda: self._core.abort(request_id))

    async def close(self) -> None:
        """End every request and the thread."""
        self._closing = True
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _check(self) -> None:
        if self._failure is not None:
            raise TersorError(f"the engine has failed: {self._failure}") from self._failure
        if self._closing:
            raise TersorError("the engine is closed")

    def _add(self, request_id: str, prompt: list[int], params: SamplingParams | None, salt: str | None) -> None:
        try:
            self._core.add(request_id, prompt, params, salt=salt)
        except TersorError as error:
            self._tell([(request_id, error)])

    def _run(self) -> None:
        """Serve jobs and run steps until told to end, or until a step fails."""
        try:
            while self._serve():
                outputs = self._core.step()
                if outputs:
                    self._tell([(one.request_id, one) for one in outputs])
            self._tell([(name, TersorError("the engine is closed")) for name in list(self._boxes)])
        except Exception as error:  # whoever waits must hear of it, and the engine's state is no longer known
            self._failure = error
            message = f"the engine has failed: {error}"
            self._tell([(name, TersorError(message)) for name in list(self._boxes)])

    def _serve(self) -> bool:
        """Run jobs that wait, or wait for one where there is nothing else to do; return whether to go on."""
        while not self._jobs.empty() or not self._core.unfinished:
            job = self._jobs.get()
            if job is None:
                return False
            job()
        return True

    def _tell(self, news: Sequence[tuple[str, RequestOutput | Exception]]) -> None:
        if self._loop is not None and news and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, list(news))

    def _deliver(self, news: Sequence[tuple[str, RequestOutput | Exception]]) -> None:
        for name, latest in news:
            box = self._boxes.get(name)
            if box is not None:
                box.put(latest)
