"""What of an output is new since it was told last? What passes between processes once a step instead of all of it.

Everything of an output only grows: tokens, their log probabilities, and its text, which holds nothing that may yet be
taken back (`stream`). So what was told is three numbers a continuation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tersor.engine.outputs import CompletionOutput, Logprobs, RequestOutput
from tersor.engine.params import SamplingParams


class Grown(NamedTuple):
    """What is new of a continuation; a plain tuple, since there are many a step.

    Attributes:
        text, token_ids, logprobs: behind what was told; the last is `None` where none were asked for.
        cumulative_logprob, finish_reason, stop_reason: as they are now.
    """

    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None
    cumulative_logprob: float | None
    finish_reason: str | None
    stop_reason: str | int | None


class News(NamedTuple):
    """What is new of a request.

    Attributes:
        outputs: of all continuations, in order.
        prompt_logprobs: behind what was told; `None` where none were asked for.
        num_cached_tokens, error, embedding: as they are now.
    """

    outputs: list[Grown]
    prompt_logprobs: list[Logprobs | None] | None
    num_cached_tokens: int
    error: str | None
    embedding: NDArray[np.float32] | None


class Teller:
    """Remembers what was told of every request that has not ended."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[int, list[tuple[int, int, int]]]] = {}

    def news(self, output: RequestOutput) -> News:
        """Return what is new of a request, and count it as told; one that is finished is forgotten."""
        name = output.request_id
        prompt, each = self._told.get(name) or (0, [(0, 0, 0)] * len(output.outputs))
        grown = [_grown(one, *told) for one, told in zip(output.outputs, each, strict=True)]
        if output.finished:
            self._told.pop(name, None)
        else:
            each = [(len(one.text), len(one.token_ids), len(one.logprobs or ())) for one in output.outputs]
            self._told[name] = len(output.prompt_logprobs or ()), each
        behind = None if output.prompt_logprobs is None else output.prompt_logprobs[prompt:]
        return News(grown, behind, output.num_cached_tokens, output.error, output.embedding)


def _grown(one: CompletionOutput, text: int, tokens: int, logprobs: int) -> Grown:
    return Grown(
        one.text[text:],
        one.token_ids[tokens:],
        None if one.logprobs is None else one.logprobs[logprobs:],
        one.cumulative_logprob,
        one.finish_reason,
        one.stop_reason,
    )


def begun(request_id: str, prompt_token_ids: list[int], params: SamplingParams | None) -> RequestOutput:
    """Return the output of a request of which nothing was told yet."""
    outputs = [CompletionOutput(index) for index in range(1 if params is None else params.n)]
    return RequestOutput(request_id, None, prompt_token_ids, outputs)


def grow(output: RequestOutput, news: News) -> None:
    """Add what is new to an output that has all that was told before."""
    for one, grown in zip(output.outputs, news.outputs, strict=True):
        one.text += grown.text
        one.token_ids += grown.token_ids
        one.logprobs = _longer(one.logprobs, grown.logprobs)
        one.cumulative_logprob = grown.cumulative_logprob
        one.finish_reason, one.stop_reason = grown.finish_reason, grown.stop_reason
    output.prompt_logprobs = _longer(output.prompt_logprobs, news.prompt_logprobs)
    output.num_cached_tokens, output.error, output.embedding = news.num_cached_tokens, news.error, news.embedding


def _longer(before: list[Any] | None, behind: list[Any] | None) -> list[Any] | None:
    if not behind:
        return behind if before is None else before
    return [*(before or ()), *behind]
