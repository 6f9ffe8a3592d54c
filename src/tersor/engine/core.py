"""The engine's loop: a step is planned and launched, then the step before it is read, and texts grow by its tokens.

A request is `SamplingParams.n` continuations of a prompt, each of which the scheduler knows as a `Request` and the
caller as a `CompletionOutput`. Nothing here runs in another thread; `threaded.py` puts one around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from tersor.engine.outputs import ABORT, ERROR, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.protocol import EngineStats
from tersor.engine.request import Request, Step, continuations
from tersor.engine.scheduler import Scheduler
from tersor.engine.stream import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Launched(Protocol):
    """A step under way."""

    step: Step

    def tokens(self) -> list[int]:
        """Wait for it and return the tokens of its rows that draw, -1 where logits were not finite."""
        ...


class Runner(Protocol):
    """Runs steps: `runner.Runner`, or in tests a model that does nothing."""

    def launch(self, step: Step) -> Launched:
        """Begin a step and return without waiting for it."""
        ...


@dataclass(slots=True)
class _Open:
    """A request that has not ended, or whose end has not been told."""

    output: RequestOutput
    streams: list[Stream]
    requests: list[Request]


class Core:
    """Runs requests through a scheduler and a runner.

    Attributes:
        scheduler: which request runs now, in which pages.
        runner: who computes.
        tokenizer: turns tokens into text; `None` gives tokens alone.
        eos: tokens that end every text that does not ignore them.
        prompt_tokens, cached_tokens, generated_tokens: counted so far.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos: Sequence[int] = (),
    ) -> None:
        self.scheduler, self.runner, self.tokenizer, self.eos = scheduler, runner, tokenizer, frozenset(eos)
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self._open: dict[str, _Open] = {}
        self._of: dict[Request, tuple[_Open, Stream]] = {}
        self._under_way: Launched | None = None
        self._news: dict[int, _Open] = {}

    @property
    def unfinished(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._open) or self._under_way is not None

    def stats(self) -> EngineStats:
        """Return how the engine stands."""
        scheduler = self.scheduler
        pages = scheduler.cache.pages
        running = sum(request.slot >= 0 for request in scheduler.everybody())
        return EngineStats(
            running=running,
            waiting=scheduler.unfinished - running,
            pages_used=pages.usable - scheduler.cache.available,
            pages_free=scheduler.cache.available,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=scheduler.preemptions,
        )

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        salt: str | None = None,
        priority: int = 0,
    ) -> None:
        """Take a request in.

        Args:
            request_id: a name that no other open request has.
            prompt_token_ids: at least one token.
            params: how to draw, with nothing that counts left `None`.
            prompt: its text, for the output.
            salt: prompts share keys and values only with prompts of the same salt.
            priority: less is sooner.

        Raises:
            InputError: a request that can never be served; nothing of it stays.
        """
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos)
        requests = continuations(request_id, prompt_token_ids, params, stop_tokens=ends, salt=salt, priority=priority)
        try:
            for request in requests:
                self.scheduler.add(request)
        except Exception:
            if request_id not in self._open:
                self.scheduler.abort(request_id)
            raise
        tokens = requests[0].prompt
        streams = [Stream(self.tokenizer, tokens, params, self.eos, request.index) for request in requests]
        output = RequestOutput(request_id, prompt, tokens, [stream.output for stream in streams])
        one = self._open[request_id] = _Open(output, streams, requests)
        self._of.update({request: (one, stream) for request, stream in zip(requests, streams, strict=True)})
        self.prompt_tokens += len(tokens)

    def abort(self, request_id: str) -> None:
        """End a request; nothing happens where it has ended or never was."""
        one = self._open.get(request_id)
        if one is None:
            return
        self.scheduler.abort(request_id)
        for request in one.requests:
            self._end(request, ABORT)

    def step(self, *, partial: bool = True) -> list[RequestOutput]:
        """Launch a step, read the one before it, and return requests that have changed.

        Args:
            partial: whether requests that go on are returned as well, as copies of what they are now.
        """
        step = self.scheduler.schedule()
        launched = None if step is None else self.runner.launch(step)
        if self._under_way is not None:
            self._read(self._under_way)
        self._under_way = launched
        news, self._news = self._news, {}
        outputs = []
        for one in news.values():
            if one.output.finished:
                outputs.append(one.output)
                if self._open.get(one.output.request_id) is one:
                    del self._open[one.output.request_id]
            elif partial:
                outputs.append(_copied(one.output))
        return outputs

    def _read(self, launched: Launched) -> None:
        step, drawn = launched.step, launched.tokens()
        for row, token in zip(step.drawing, drawn, strict=True):
            if token < 0 and row.request.finish_reason is None:
                self.scheduler.end(row.request, ERROR)
                self._of[row.request][0].output.error = "the model's logits are not finite"
                self._end(row.request, ERROR)
        for place in self.scheduler.finish(step, drawn):
            request = step.drawing[place].request
            one, stream = self._of[request]
            one.output.num_cached_tokens = max(one.output.num_cached_tokens, request.num_cached)
            self.generated_tokens += 1
            self._news[id(one)] = one
            if stream.push(drawn[place]):
                self.scheduler.end(request, stream.output.finish_reason or "")
            if request.finish_reason is not None:
                self._end(request, request.finish_reason)

    def _end(self, request: Request, reason: str) -> None:
        """Finish the text of a request that has ended."""
        found = self._of.pop(request, None)
        if found is not None:
            one, stream = found
            stream.finish(reason)
            self._news[id(one)] = one
            if request.index == 0:
                self.cached_tokens += request.num_cached

    def check_grammar(self, grammar: Mapping[str, Any]) -> None:
        """Refuse a grammar that texts cannot be held to."""
        raise NotImplementedError


def _copied(output: RequestOutput) -> RequestOutput:
    """Return an output that does not grow any more."""
    outputs = [
        replace(one, token_ids=one.token_ids.copy(), logprobs=None if one.logprobs is None else one.logprobs.copy())
        for one in output.outputs
    ]
    return replace(output, outputs=outputs)
