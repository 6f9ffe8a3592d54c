"""What all endpoints share: the engine, the model's name, its parsers, and checks that every request passes."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from tersor.engine.protocol import AsyncEngine
from tersor.errors import TersorError
from tersor.server.answering import Front
from tersor.server.errors import ApiError, of_exception
from tersor.server.logprobs import TokenBytes
from tersor.server.metrics import Metrics
from tersor.server.options import ServerOptions
from tersor.server.parsers import Parsers
from tersor.server.prompts import Prompts

_COMPILERS = 4
"""Grammars that compile at the same time."""


class Api:
    """One model behind HTTP.

    Attributes:
        engine, options: as given.
        name: what the model is called.
        begun: seconds since the epoch at which the server began.
    """

    def __init__(self, engine: AsyncEngine, options: ServerOptions) -> None:
        info = engine.info
        self.engine, self.options, self.info = engine, options, info
        self.name = options.name or info.name
        self.prompts = Prompts(info.tokenizer, info.vocabulary)
        self.parsers = Parsers.of(options.tool_parser, options.reasoning_parser, self.prompts.template)
        self.metrics = Metrics()
        self.front = Front(engine, self.metrics, options.max_queue)
        self.bytes_of = TokenBytes(info.tokenizer)
        self.begun = int(time.time())
        self._compilers = asyncio.Semaphore(_COMPILERS)

    async def close(self) -> None:
        """End the tokenizer's thread and the engine."""
        self.prompts.close()
        await self.engine.close()

    def told(self, error: BaseException) -> ApiError:
        """Return what a client is told of an exception."""
        return of_exception(error, self.engine.healthy)

    def check_model(self, name: str | None) -> None:
        """Refuse another model.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.name:
            raise ApiError(
                404, f"there is no model {name!r}: here is {self.name!r}", param="model", code="model_not_found"
            )

    def room(self, prompt: int, wanted: int | None, name: str = "max_tokens") -> int:
        """Return how many tokens an answer may have: what was asked for, or what fits behind the prompt.

        Args:
            prompt: tokens of the prompt.
            wanted: what was asked for, by the field `name`.

        Raises:
            ApiError: it does not fit; nothing is cut in silence.
        """
        context = self.info.context
        if wanted is None and prompt >= context:
            message = f"the prompt has {prompt} tokens and the model's context is {context}: no token is left to draw"
        elif wanted is not None and prompt + wanted > context:
            message = f"the prompt has {prompt} tokens and {name} is {wanted}: the model's context is {context}"
        else:
            return context - prompt if wanted is None else wanted
        raise ApiError(400, message, param=name if wanted is not None else None, code="context_length_exceeded")

    async def check_grammar(self, grammar: Mapping[str, Any] | None, param: str = "response_format") -> None:
        """Compile a grammar off the event loop.

        Raises:
            ApiError: it is none, or takes too long; `param` is the field that it came from.
        """
        if grammar is None:
            return
        limit = self.options.grammar_seconds
        try:
            await asyncio.wait_for(self._compile(grammar), limit)
        except asyncio.TimeoutError:
            raise ApiError(400, f"{param}: the grammar takes longer than {limit:g} s to compile", param=param) from None
        except TersorError as error:
            raise ApiError(400, f"{param}: {error}", param=param) from None

    async def _compile(self, grammar: Mapping[str, Any]) -> None:
        """Compile in a thread that may be given up: it keeps its place among the compilers, and no process alive."""
        await self._compilers.acquire()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def tell(error: Exception | None) -> None:
            self._compilers.release()
            if not ended.done():
                ended.set_result(None) if error is None else ended.set_exception(error)

        def work() -> None:
            error: Exception | None = None
            try:
                self.engine.check_grammar(grammar)
            except Exception as found:
                error = found
            if not loop.is_closed():
                loop.call_soon_threadsafe(tell, error)

        try:
            threading.Thread(target=work, name="tersor-grammar", daemon=True).start()
        except BaseException:
            self._compilers.release()
            raise
        await ended

    def head(self, kind: str, prefix: str) -> dict[str, Any]:
        """Return the fields that begin every response and every chunk of one."""
        created = int(time.time())
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": created, "model": self.name}

    def usage(self, prompts: Sequence[int], completion: int, cached: int) -> dict[str, Any]:
        """Return what a request took, and count it.

        Args:
            prompts: tokens of each prompt.
            completion: tokens of all answers.
            cached: tokens of prompts whose keys and values were there.
        """
        prompt = sum(prompts)
        self.metrics.prompt_tokens += prompt
        self.metrics.completion_tokens += completion
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
