"""A model of the engine as lm-eval asks for it: log-likelihoods are sums of a prompt's log probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from tersor.engine.outputs import RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.protocol import ModelInfo
from tersor.errors import InputError, TersorError, did_you_mean

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MOST_DRAWN = 256
"""Tokens that a task draws at most where it says nothing, as other models of lm-eval have it."""

_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the most tokens to draw; the first one that is given holds."""

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
"""Options of a task that are the engine's under the same name."""

Scored = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Of each token of a text but the first: its log probability, and whether it was the most probable one."""


class Answering(Protocol):
    """What answers prompts: `tersor.LLM`."""

    @property
    def info(self) -> ModelInfo:
        """The model."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        on_finished: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts, and return one output each, in their order."""
        ...


class EngineLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A model of the engine, asked by lm-eval's tasks.

    All requests of a task are given to the engine at once, which computes what they share once. A text and one more
    token have to fit into the context, so that contexts are two tokens shorter than those of other models of lm-eval.
    """

    def __init__(self, llm: Answering, progress: Callable[[int, int], None] | None = None) -> None:
        """Take a model.

        Args:
            llm: the model.
            progress: called with (requests done, requests in all) after every request.
        """
        super().__init__()
        self._llm = llm
        self._progress = progress
        self.tokenizer = llm.info.tokenizer

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text, which also stands before a text that has nothing ahead of it.

        Raises:
            InputError: the tokenizer has none.
        """
        token: int | None = self.tokenizer.eos_token_id
        if token is None:
            raise InputError(f"{self._llm.info.name}: the tokenizer has no end-of-sequence token, which tasks need")
        return token

    @property
    def prefix_token_id(self) -> int:
        """Return the token that stands before a text that has nothing ahead of it: that of the beginning, if any."""
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def max_length(self) -> int:
        """Return how many tokens may stand before the last one that is scored."""
        return self._llm.info.context - 2

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text; the tokenizer adds those that it adds to every text, unless it is told not to.

        A text that begins with the beginning-of-sequence token as text gets no second one.
        """
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin and string.startswith(begin))
        tokens: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return tokens

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, cut where it is longer than the context as lm-eval cuts it."""
        pairs: list[tuple[list[int], list[int]]] = []
        ends = [0]
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            pairs += [make_disjoint_window(window) for window in windows]
            ends.append(len(pairs))
        scores = [score for score, _ in self._scores(pairs)]
        return [float(sum(scores[start:end])) for start, end in pairwise(ends)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return, of each continuation, its log-likelihood and whether it is the greedy one."""
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score continuations behind contexts, both in tokens; a text is read once, however often it is asked for.

        Raises:
            InputError: a continuation longer than the context of the model.
        """
        texts = []
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a task asks for the log-likelihood of {len(continuation)} tokens, and the model reads "
                    f"{self.max_length}"
                )
            texts.append(tuple([*context, *continuation][-(self.max_length + 1) :]))
        scored = self._scored(list(dict.fromkeys(texts)))
        found = []
        for text, (_, continuation) in zip(texts, pairs, strict=True):
            logprobs, most_probable = scored[text]
            count = len(continuation)
            start = len(logprobs) - count
            found.append((float(logprobs[start:].sum()), bool(most_probable[start:].all())))
        return found

    def _scored(self, texts: list[tuple[int, ...]]) -> dict[tuple[int, ...], Scored]:
        """Return what the model says of each text; the engine's own record of it is dropped as soon as it is read."""
        scored: dict[tuple[int, ...], Scored] = {}

        def read(output: RequestOutput) -> None:
            entries = self._checked(output).prompt_logprobs or []
            tokens = tuple(output.prompt_token_ids)
            own = [entry[token] for token, entry in zip(tokens, entries, strict=True) if entry is not None]
            output.prompt_logprobs = None
            scored[tokens] = (
                np.array([one.logprob for one in own], dtype=np.float64),
                np.array([one.rank == 1 for one in own], dtype=np.bool_),
            )
            self._told(len(scored), len(texts))

        params = SamplingParams(max_tokens=1, temperature=0, repetition_penalty=1, prompt_logprobs=0)
        self._llm.generate(texts, [params] * len(texts), on_finished=read)
        return scored

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to what ends it; a context too long loses its beginning.

        Raises:
            InputError: an option of a task that the engine does not have, or no room for a context.
        """
        prompts, each = [], []
        for request in requests:
            context, options = request.args
            params = sampling(options)
            room = self._llm.info.context - (params.max_tokens or 0)
            if room < 1:
                raise InputError(
                    f"a task draws {params.max_tokens} tokens, and the context of the model is {self._llm.info.context}"
                )
            prompts.append(self.tok_encode(context)[-room:])
            each.append(params)
        done = [0]

        def count(output: RequestOutput) -> None:
            self._checked(output)
            done[0] += 1
            self._told(done[0], len(requests))

        outputs = self._llm.generate(prompts, each, on_finished=count)
        return [output.outputs[0].text for output in outputs]

    def _checked(self, output: RequestOutput) -> RequestOutput:
        if output.error is not None:
            raise TersorError(f"{self._llm.info.name}: a request of a task failed: {output.error}")
        return output

    def _told(self, done: int, count: int) -> None:
        if self._progress is not None:
            self._progress(done, count)


def sampling(options: Mapping[str, Any]) -> SamplingParams:
    """Return how the engine draws what a task's `generation_kwargs` ask for: greedily, unless they say otherwise.

    Raises:
        InputError: an option that the engine does not have, or a value that it cannot have.
    """
    known = {"until", "do_sample", *_MOST, *_SAMPLING}
    for name in options:
        if name not in known:
            near = did_you_mean(name, known)
            raise InputError(
                f"a task has the generation option {name!r}{near}: the engine has {', '.join(sorted(known))}"
            )
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    most = next((int(options[name]) for name in _MOST if options.get(name) is not None), MOST_DRAWN)
    given = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    temperature = float(given.pop("temperature", 1.0 if options.get("do_sample") else 0.0))
    if options.get("do_sample") is False:
        temperature = 0.0
    settled: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, **given}
    return SamplingParams(max_tokens=most, temperature=temperature, stop=[stop for stop in stops if stop], **settled)
