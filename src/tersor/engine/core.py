"""The engine's loop: a step is planned and launched, then the step before it is read, and texts grow by its tokens.

A request is `SamplingParams.n` continuations of a prompt, each of which the scheduler knows as a `Request` and the
caller as a `CompletionOutput`. Nothing here runs in another thread; `threaded.py` puts one around it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tersor.engine.options import resolved, seed_of
from tersor.engine.outputs import ABORT, ERROR, STOP, Logprob, Logprobs, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.request import DELAYED, WAITING, Request, Step, continuations, prompt_targets
from tersor.engine.scheduler import Scheduler
from tersor.engine.stats import EngineStats, stats
from tersor.engine.stream import Stream
from tersor.engine.token_texts import TokenTexts
from tersor.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from tersor import ops
    from tersor.engine.grammar import Grammars, Matcher
    from tersor.engine.workers import Team


_NOTHING = SamplingParams(
    max_tokens=1, temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, seed=0, ignore_eos=True
)
"""How the token is drawn that nobody asks for, behind a prompt whose last state is asked for."""

_LEAST = np.float32(1e-12)
"""What a row of zeros is divided by."""


class Launched(Protocol):
    """A step under way: `launched.Launched`.

    Attributes:
        step: which.
    """

    step: Step

    @property
    def logprobs(self) -> Any:
        """`ops.Logprobs` of tokens drawn, or `None`, once it has ended."""

    @property
    def prompt_logprobs(self) -> Any:
        """The same of prompts."""

    @property
    def states(self) -> Any:
        """Float32 [rows of `step.embedding`, H], or `None`, once it has ended."""

    def tokens(self) -> list[int]:
        """Wait for it and return the tokens of its rows that draw, -1 where logits were not finite."""
        ...


class Runner(Protocol):
    """Runs steps: `runner.Runner`, or in tests a model that does nothing."""

    def launch(self, step: Step, masks: Mapping[int, torch.Tensor]) -> Launched:
        """Begin a step and return without waiting for it.

        Args:
            step: what is computed.
            masks: slot -> the tokens that its grammar allows, int32 [ceil(V / 32)].
        """
        ...


@dataclass(slots=True)
class _Failed:
    """A step that was not launched, whose requests have ended."""

    step: Step
    logprobs: None = None
    prompt_logprobs: None = None
    states: None = None

    def tokens(self) -> list[int]:
        return [-1] * len(self.step.drawing)


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
        defaults: the model's generation config, which fills what requests leave open.
        seed: makes those of requests that give none, in the order in which they come; `None` draws fresh ones.
        vocabulary: tokens that there are logits for, which grammars need to know.
        team: the ranks that compute together, which end when nobody has them any more; `None` with a runner by itself.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos: Sequence[int] = (),
        *,
        defaults: Mapping[str, Any] | None = None,
        seed: int | None = None,
        vocabulary: int = 0,
        team: Team | None = None,
        ahead: bool = True,
    ) -> None:
        self.scheduler, self.runner, self.tokenizer, self.eos = scheduler, runner, tokenizer, frozenset(eos)
        self.defaults, self.seed, self.vocabulary = defaults or {}, seed, vocabulary
        self.team, self._ahead = team, ahead
        self._seeds = 0  # made so far
        self._names = None if tokenizer is None else TokenTexts(tokenizer.decode, joined=False)
        self._open: dict[str, _Open] = {}
        self._of: dict[Request, tuple[_Open, Stream]] = {}
        self._under_way: deque[Launched] = deque()
        self._news: dict[int, _Open] = {}
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self._matchers: dict[Request, Matcher] = {}

    @property
    def unfinished(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._open or self._under_way)

    def stats(self) -> EngineStats:
        """Return how the engine stands."""
        return stats(self.scheduler)

    def settled(self, params: SamplingParams) -> SamplingParams:
        """Return options of which nothing is open: the model's defaults fill them and, where this engine makes seeds,
        the next one. Those that are settled stay as they are."""
        params = resolved(params, self.defaults)
        if params.seed is None and self.seed is not None:
            params = replace(params, seed=seed_of(self.seed, self._seeds))
            self._seeds += 1
        return params

    def check(self, request_id: str, prompt_tokens: int, params: SamplingParams | None) -> None:
        """Check whether a request by itself can be served.

        Args:
            request_id: for the message.
            prompt_tokens: how many tokens its prompt has.
            params: how to draw; `None` asks for the last state.

        Raises:
            InputError: it can never be.
            UnsupportedError: its grammar needs xgrammar.
        """
        self.scheduler.extent(request_id, prompt_tokens, 0 if params is None else params.max_tokens)
        if params is not None and params.grammar is not None:
            self.check_grammar(params.grammar)

    def requests(self, request_id: str) -> Sequence[Request]:
        """Return the continuations of an open request, those that have ended as well."""
        return self._open[request_id].requests

    def begun(self, request_id: str) -> bool:
        """Whether an open request has ever had pages."""
        return any(request.state not in (WAITING, DELAYED) for request in self.requests(request_id))

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None,
        *,
        prompt: str | None = None,
        salt: str | None = None,
        priority: int = 0,
    ) -> None:
        """Take a request in.

        Args:
            request_id: a name that no other open request has.
            prompt_token_ids: at least one token.
            params: how to draw; `None` asks for the last state, `RequestOutput.embedding`, and no token.
            prompt: its text, for the output.
            salt: prompts share keys and values only with prompts of the same salt.
            priority: less is sooner.

        Raises:
            InputError: a request that can never be served; nothing of it stays.
        """
        embeds = params is None
        params = self.settled(params or _NOTHING)
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos)
        matchers = []
        if params.grammar is not None:
            matchers = [self._made_grammars().matcher(params.grammar) for _ in range(params.n)]
        requests = continuations(
            request_id,
            prompt_token_ids,
            params,
            stop_tokens=ends,
            salt=salt,
            priority=priority,
            embeds=embeds,
            ahead=params.grammar is None,
        )
        try:
            for request in requests:
                self.scheduler.add(request)
        except Exception:
            if request_id not in self._open:
                self.scheduler.abort(request_id)
            raise
        self._matchers.update(zip(requests, matchers, strict=False))
        tokens = list(prompt_token_ids)
        tokenizer = None if embeds else self.tokenizer
        streams = [Stream(tokenizer, tokens, params, self.eos, request.index) for request in requests]
        output = RequestOutput(request_id, prompt, tokens, [stream.output for stream in streams])
        one = self._open[request_id] = _Open(output, streams, requests)
        self._of.update({request: (one, stream) for request, stream in zip(requests, streams, strict=True)})
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]

    def abort(self, request_id: str) -> None:
        """End a request; nothing happens where it has ended or never was."""
        one = self._open.get(request_id)
        if one is None:
            return
        self.scheduler.abort(request_id)
        for request in one.requests:
            self._end(request, ABORT)

    def step(self, *, partial: bool = True) -> list[RequestOutput]:
        """Launch a step, read the one before it, or as many before as there are stages (this one, if not `ahead`), and
        return requests that changed.

        Args:
            partial: whether requests that go on are returned as well, as copies of what they are now.

        Raises:
            Exception: what the runner raises. Requests of a step that was not launched have ended; those of one that
                could not be read have not, and it is read again.
        """
        step = self.scheduler.schedule()
        if step is not None:
            self._under_way.append(self._launched(step))
        most = self.scheduler.limits.stages if self._ahead else 0
        if self._under_way and (step is None or len(self._under_way) > most):
            self._read(late=not partial)
        news, self._news = self._news, {}
        outputs = []
        for one in news.values():
            if one.output.finished:
                outputs.append(one.output)
                if self._open.get(one.output.request_id) is one:
                    del self._open[one.output.request_id]
            elif partial:
                outputs.append(one.output.copied())
        return outputs

    def check_grammar(self, grammar: Mapping[str, Any]) -> None:
        """Compile a grammar; any thread may ask.

        Raises:
            InputError: it is none.
            UnsupportedError: xgrammar is not installed.
        """
        self._made_grammars().compile(grammar)

    def _made_grammars(self) -> Grammars:
        with self._grammars_lock:
            if self._grammars is None:
                if self.tokenizer is None:
                    raise UnsupportedError("texts that match a grammar need a tokenizer")
                from tersor.engine.grammar import Grammars

                self._grammars = Grammars(self.tokenizer, self.vocabulary, self.eos)
            return self._grammars

    def _launched(self, step: Step) -> Launched:
        """Launch a step; one that fails is read in its turn, too, since the scheduler has planned it."""
        try:
            return self.runner.launch(step, self._masks(step))
        except BaseException:
            for request in (*(row.request for row in step.rows), *step.grown):
                self.scheduler.end(request, ERROR)
                self._end(request, ERROR)
            self._under_way.append(_Failed(step))
            raise

    def _masks(self, step: Step) -> dict[int, torch.Tensor]:
        """Return slot -> tokens that may be drawn, of the rows that have a grammar."""
        if not self._matchers:
            return {}
        drawing = (row.request for row in step.drawing)
        return {request.slot: self._matchers[request].mask() for request in drawing if request in self._matchers}

    def _whole(self, request: Request, token: int) -> bool:
        """Tell a grammar of a token, and return whether its text is whole."""
        matcher = self._matchers.get(request)
        return matcher is not None and matcher.accept(token)

    def _read(self, *, late: bool) -> None:
        """Take what the oldest step drew; where nobody sees requests before they end, texts may come `late`."""
        launched = self._under_way[0]
        step, drawn = launched.step, launched.tokens()
        self._under_way.popleft()  # who interrupts the wait finds it still there
        if launched.prompt_logprobs is not None:
            self._read_prompts(step, launched.prompt_logprobs)
        for row, token in zip(step.drawing, drawn, strict=True):
            if token < 0 and row.request.finish_reason is None:
                self.scheduler.end(row.request, ERROR)
                self._of[row.request][0].output.error = "the model's logits are not finite"
                self._end(row.request, ERROR)
        states = {} if launched.states is None else dict(zip(step.embedding, launched.states.numpy(), strict=True))
        for place in self.scheduler.finish(step, drawn):
            request, token = step.drawing[place].request, drawn[place]
            one, stream = self._of[request]
            one.output.num_cached_tokens = max(one.output.num_cached_tokens, request.num_cached)
            if not late:
                self._news[id(one)] = one
            if request.embeds:
                one.output.embedding = _at_length_1(states[place])
                self._end(request, STOP)
                continue
            logprobs = None
            if request.params.logprobs is not None:
                logprobs = self._logprobs(launched.logprobs, place, token, request.params.logprobs)
            if stream.push(token, logprobs, late=late) or (self._matchers and self._whole(request, token)):
                self.scheduler.end(request, STOP)
            if request.finish_reason is not None:
                self._end(request, request.finish_reason)

    def _end(self, request: Request, reason: str) -> None:
        """Finish the text of a request that has ended."""
        self._matchers.pop(request, None)
        found = self._of.pop(request, None)
        if found is not None:
            one, stream = found
            stream.finish(reason)
            self._news[id(one)] = one

    def _read_prompts(self, step: Step, found: ops.Logprobs) -> None:
        """Give the log probabilities of tokens of prompts to their requests."""
        at = 0
        for row in step.rows:
            request = row.request
            wanted = request.params.prompt_logprobs
            for target in prompt_targets(row):
                opened = self._of.get(request)
                if opened is not None and opened[0].output.prompt_logprobs is not None and wanted is not None:
                    token = request.prompt[target]
                    opened[0].output.prompt_logprobs.append(self._logprobs(found, at, token, wanted))
                at += 1

    def _logprobs(self, found: ops.Logprobs, place: int, token: int, wanted: int) -> Logprobs:
        """Return the log probabilities of one token, and of the most probable ones beside it."""

        def text(token: int) -> str:
            return "" if self._names is None else self._names[token]

        entry = {token: Logprob(float(found.chosen[place]), int(found.ranks[place]), text(token))}
        best = zip(found.tokens[place, :wanted].tolist(), found.values[place, :wanted].tolist(), strict=True)
        for rank, (other, value) in enumerate(best, 1):
            entry.setdefault(other, Logprob(value, rank, text(other)))
        return entry


def _at_length_1(state: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a row divided by its Euclidean norm; by itself, so that no other request changes a bit of it."""
    return state / max(np.linalg.norm(state), _LEAST)
