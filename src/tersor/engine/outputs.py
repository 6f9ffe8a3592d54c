"""What does a request give back? Texts, tokens and why they ended, under the names that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

STOP, LENGTH, ABORT, ERROR = "stop", "length", "abort", "error"
"""Why a continuation ended: a stop text or token; `max_tokens` or the context; `abort`; a step that failed."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log probability, after penalties and before temperature.

    Attributes:
        logprob: natural logarithm.
        rank: 1 for the most probable token.
        decoded_token: its text.
    """

    logprob: float
    rank: int
    decoded_token: str


Logprobs = dict[int, Logprob]
"""Token -> its log probability: of the token drawn, and of the most probable ones asked for."""


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        index: 0 to n - 1.
        text: what is complete so far.
        token_ids: tokens so far, that of a stop included.
        cumulative_logprob: sum over the tokens, where `logprobs` was asked for.
        logprobs: one entry a token, where asked for.
        finish_reason: `None` while it goes on; then `STOP`, `LENGTH`, `ABORT` or `ERROR`.
        stop_reason: the stop text, or the token of `stop_token_ids`, that ended it; `None` for the model's own end.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request and its continuations, so far or finished.

    Attributes:
        request_id: as it was given.
        prompt: its text, where it was text.
        prompt_token_ids: its tokens.
        outputs: n continuations, in order.
        prompt_logprobs: one entry a token of the prompt, `None` for the first, where asked for.
        num_cached_tokens: tokens of the prompt whose keys and values were there already.
        error: why the request failed, or `None`.
        embedding: what `EmbeddingOutput` holds, where the last state was asked for and not a text.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Logprobs | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    embedding: NDArray[np.float32] | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more comes."""
        return all(one.finish_reason is not None for one in self.outputs)

    def copied(self) -> RequestOutput:
        """Return an output of what there is now, which does not grow any more."""
        outputs = [
            replace(one, token_ids=one.token_ids.copy(), logprobs=None if one.logprobs is None else one.logprobs.copy())
            for one in self.outputs
        ]
        return replace(self, outputs=outputs)


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The last state of a prompt.

    Attributes:
        embedding: float32 [hidden size], of length 1: the row of the last token behind the model's last norm, which is
            what its head reads.
    """

    embedding: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """A prompt whose last state was asked for.

    Attributes:
        request_id: as it was given.
        prompt: its text, where it was text.
        prompt_token_ids: its tokens.
        outputs: the state; without one number where the request failed.
        num_cached_tokens: tokens of the prompt whose keys and values were there already.
        error: why the request failed, or `None`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    num_cached_tokens: int = 0
    error: str | None = None

    @classmethod
    def of(cls, output: RequestOutput) -> EmbeddingRequestOutput:
        """Return what an engine told of such a request."""
        state, error = output.embedding, output.error
        if state is None:
            state, error = np.empty(0, np.float32), error or "the engine ended it with nothing"
        found, cached = EmbeddingOutput(state), output.num_cached_tokens
        return cls(output.request_id, output.prompt, output.prompt_token_ids, found, cached, error)


Answer: TypeAlias = RequestOutput | EmbeddingRequestOutput
"""What a prompt gets: texts, or its last state."""
