"""An engine in a thread of its own, asked from an event loop: `protocol.AsyncEngine` over `core.Core`.

The thread alone touches the core (`loop`). Outputs come back once a step, of every request the newest (`boxes`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from tersor.engine.boxes import Boxes
from tersor.engine.core import Core
from tersor.engine.loop import Loop, Told
from tersor.engine.outputs import RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.protocol import ModelInfo
from tersor.engine.stats import CopyStats, EngineStats
from tersor.errors import TersorError


class ThreadedEngine:
    """Answers many requests at once; see `protocol.AsyncEngine`, whose methods these are."""

    def __init__(self, core: Core, info: ModelInfo) -> None:
        self._core, self._info = core, info
        self._steps, self._boxes = Loop(), Boxes()
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

    def copies(self) -> Sequence[CopyStats]:
        """Return nothing: the model is there once."""
        return ()

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
        box = self._boxes.open(request_id)
        self._loop = asyncio.get_running_loop()
        ended = False
        try:
            self._check()  # the box is there: an engine that fails from now on puts a word into it
            self._steps.add(request_id, list(prompt_token_ids), params, salt)
            while not ended:
                latest = await box.next()
                ended = latest.finished
                yield latest
        finally:
            self._boxes.close(request_id)
            if not ended:
                self._steps.abort(request_id)

    async def abort(self, request_id: str) -> None:
        """End a request within a step."""
        self._steps.abort(request_id)

    async def close(self) -> None:
        """End every request and the thread."""
        self._closing = True
        self._steps.end()
        await asyncio.to_thread(self._thread.join)

    def _check(self) -> None:
        if self._failure is not None:
            raise TersorError(f"the engine has failed: {self._failure}") from self._failure
        if self._closing:
            raise TersorError("the engine is closed")

    def _run(self) -> None:
        """Run steps until told to end, or until one fails; whoever waits then must hear of it."""
        message = "the engine is closed"
        try:
            self._steps.run(self._core, self._tell)
        except Exception as error:  # the engine's state is no longer known
            self._failure = error
            message = f"the engine has failed: {error}"
        self._tell([(name, TersorError(message)) for name in self._boxes])

    def _tell(self, news: Told) -> None:
        if self._loop is not None and news and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: Told) -> None:
        for name, latest in news:
            self._boxes.put(name, latest)
