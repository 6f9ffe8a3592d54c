"""An engine without a model: it says what it is told to, or draws tokens from a hash, a step at a time on the CPU."""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tersor.engine.outputs import ABORT, ERROR, LENGTH, Logprob, Logprobs, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.protocol import ModelInfo
from tersor.engine.stats import CopyStats, EngineStats
from tersor.engine.stream import Stream
from tersor.errors import InputError, TersorError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAGE = 64


@dataclass
class _Request:
    name: str
    prompt: list[int]
    params: SamplingParams
    salt: str | None
    scripts: list[list[int] | None]  # tokens to say, one list a continuation; None draws
    streams: list[Stream]
    output: RequestOutput
    news: asyncio.Event = field(default_factory=asyncio.Event)
    pages: int = 0

    @property
    def length(self) -> int:
        return sum(len(self.prompt) + len(one.token_ids) for one in self.output.outputs)


class FakeEngine:
    """Keeps the promises of `AsyncEngine`, and remembers what it was asked.

    Attributes:
        step: seconds a step takes.
        burst: tokens of a step, as if tokens came together.
        rows: requests that run at once.
        paused: whether steps draw nothing.
        asked: every request: (tokens of the prompt, params, salt).
        aborted: names that `abort` was called with.
        steps: steps made.
        broken: text of prompts that fail alone when they run.
        of_copies: what it says of copies.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, step: float = 0.0005, context: int = 512, pages: int = 64
    ) -> None:
        self.tokenizer, self.step, self.burst, self.rows = tokenizer, step, 1, 64
        self._info = ModelInfo("tiny-lm", context, 8192, tokenizer)
        self.pages, self.paused = pages, False
        self.asked: list[tuple[list[int], SamplingParams, str | None]] = []
        self.aborted: list[str] = []
        self.steps, self.broken = 0, "break alone"
        self.grammar_seconds = 0.0
        self._says: deque[str] = deque()
        self._running: dict[str, _Request] = {}
        self._waiting: dict[str, _Request] = {}
        self._known: set[bytes] = set()
        self._failed: str | None = None
        self._loop: asyncio.Task[None] | None = None
        self._prompt_tokens = self._cached = self._generated = 0
        self.closed = False
        self.of_copies: list[CopyStats] = []

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def healthy(self) -> bool:
        return self._failed is None

    def say(self, *texts: str) -> None:
        """Have the next continuations say texts and end, in the order in which they are asked for."""
        self._says.extend(texts)

    def fail(self, message: str) -> None:
        """Fail at the next step, with everything that is open."""
        self._failed = message
        for request in [*self._running.values(), *self._waiting.values()]:
            request.news.set()

    def stats(self) -> EngineStats:
        used = sum(request.pages for request in self._running.values())
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=used,
            pages_free=self.pages - used,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached,
            generated_tokens=self._generated,
        )

    def copies(self) -> Sequence[CopyStats]:
        return self.of_copies

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        request = self._running.pop(request_id, None) or self._waiting.pop(request_id, None)
        if request is not None:
            for one in request.output.outputs:
                one.finish_reason = one.finish_reason or ABORT
            request.news.set()

    def check_grammar(self, grammar: Mapping[str, Any]) -> None:
        import time

        time.sleep(self.grammar_seconds)
        schema = grammar.get("json_schema")
        if schema is not None and (not isinstance(schema, dict) or schema.get("type") not in ("object", "array")):
            raise InputError(f"the schema has no type that ends: {schema}")

    async def close(self) -> None:
        self.closed = True
        for name in [*self._running, *self._waiting]:
            await self.abort(name)
        if self._loop is not None:
            self._loop.cancel()

    async def generate(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, *, request_id: str, salt: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        prompt = list(prompt_token_ids)
        assert prompt and request_id not in self._running and request_id not in self._waiting
        self.asked.append((prompt, params, salt))
        if (len(prompt) + PAGE - 1) // PAGE > self.pages:
            raise InputError(f"the prompt has {len(prompt)} tokens, all pages together hold {self.pages * PAGE}")
        scripts = [self._encode(self._says.popleft()) if self._says else None for _ in range(params.n)]
        streams = [Stream(self.tokenizer, prompt, params, (0,), index) for index in range(params.n)]
        output = RequestOutput(request_id, None, prompt, [stream.output for stream in streams])
        request = self._waiting[request_id] = _Request(request_id, prompt, params, salt, scripts, streams, output)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._steps())
        while True:
            await request.news.wait()
            request.news.clear()
            if self._failed is not None and not output.finished:
                raise TersorError(self._failed)
            yield copy.deepcopy(output)
            if output.finished:
                return

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    async def _steps(self) -> None:
        while self.healthy and (self._running or self._waiting):
            await asyncio.sleep(self.step)
            if not self.paused and self.healthy:
                self._step()

    def _step(self) -> None:
        self.steps += 1
        for name in list(self._waiting):
            if len(self._running) < self.rows:
                self._admit(self._waiting.pop(name))
        for name, request in list(self._running.items()):
            if self.broken in self.tokenizer.decode(request.prompt):
                request.output.error = "this prompt broke"
                for one in request.output.outputs:
                    one.finish_reason = ERROR
            for stream in request.streams:
                for _ in range(self.burst):
                    if stream.output.finish_reason is None:
                        self._draw(request, stream)
            request.pages = (request.length + PAGE - 1) // PAGE
            if request.output.finished:
                del self._running[name]
            request.news.set()

    def _admit(self, request: _Request) -> None:
        self._running[request.name] = request
        self._prompt_tokens += len(request.prompt)
        for end in range(PAGE, len(request.prompt), PAGE):
            key = hashlib.sha256(repr((request.salt, request.prompt[:end])).encode()).digest()
            if key in self._known:
                request.output.num_cached_tokens = end
            self._known.add(key)
        self._cached += request.output.num_cached_tokens
        if request.params.prompt_logprobs is not None:
            most = request.params.prompt_logprobs
            request.output.prompt_logprobs = [None, *(self._logprobs(token, most) for token in request.prompt[1:])]

    def _draw(self, request: _Request, stream: Stream) -> None:
        one, params, script = stream.output, request.params, request.scripts[stream.output.index]
        place = len(one.token_ids)
        if script is not None:
            token = script[place] if place < len(script) else 0
        else:
            key = (params.seed, one.index if params.temperature != 0 else 0, request.prompt, one.token_ids)
            token = 1 + int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little") % 8191
        self._generated += 1
        stream.push(token, None if params.logprobs is None else self._logprobs(token, params.logprobs))
        if len(one.token_ids) == params.max_tokens:
            stream.finish(LENGTH)

    def _logprobs(self, token: int, most: int) -> Logprobs:
        """Made up: the token is as likely as its number says, the most likely ones are the tokens 1, 2, ..."""
        likely = [(other, -0.25 * rank, rank) for rank, other in enumerate(range(1, most + 1), 1)]
        own = (token, -6.0 - token / 8192, 100 + token)
        rows = [*likely, *([] if any(other == token for other, *_ in likely) else [own])]
        return {other: Logprob(value, rank, str(self.tokenizer.decode([other]))) for other, value, rank in rows}
