"""What does the answer of OpenAI's API look like? Bodies of chat completions, completions and embeddings."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from tersor.engine.openai_body import CHAT, Ask
from tersor.engine.outputs import CompletionOutput, Logprob, Logprobs, RequestOutput


@dataclass(frozen=True, slots=True)
class Embedded:
    """The last state of a prompt.

    Attributes:
        request_id: as it was given.
        prompt_tokens: how many tokens it has.
        vector: float32 [hidden].
        error: why the request failed, or `None`.
    """

    request_id: str
    prompt_tokens: int
    vector: Sequence[float] | np.ndarray
    error: str | None = None


Message = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Turns a text, and the options that it was asked with, into the assistant's message (tool calls, reasoning apart)."""


def plain_message(text: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return a message of nothing but text."""
    return {"role": "assistant", "content": text}


def completion(
    ask: Ask, answers: Sequence[RequestOutput], *, name: str, model: str, created: int, message: Message = plain_message
) -> dict[str, Any]:
    """Return the body that answers a chat (one output) or completions (an output a prompt, continuations in order).

    Args:
        ask: what was asked.
        answers: finished.
        name: of this answer, unique.
        model: its name.
        created: seconds since 1970.
        message: makes the message of a chat.
    """
    choices: list[dict[str, Any]] = []
    most = (ask.params.logprobs if ask.params else None) or 0
    for output in answers:
        for one in output.outputs:
            choice: dict[str, Any] = {"index": len(choices), "logprobs": None, "finish_reason": one.finish_reason}
            if ask.url == CHAT:
                choice["message"] = message(one.text, ask.options)
                if choice["message"].get("tool_calls"):
                    choice["finish_reason"] = "tool_calls"
                if one.logprobs is not None:
                    choice["logprobs"] = {"content": list(_content(one, most))}
            else:
                choice["text"] = one.text
                if one.logprobs is not None:
                    choice["logprobs"] = _columns(one, most)
            choice["stop_reason"] = one.stop_reason
            choices.append(choice)
    chat = ask.url == CHAT
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": _usage(answers),
    }


def embeddings(ask: Ask, answers: Sequence[Embedded], *, model: str) -> dict[str, Any]:
    """Return the body that answers a request of embeddings, one answer a prompt."""
    data = []
    for index, answer in enumerate(answers):
        vector = np.asarray(answer.vector, dtype="<f4")
        shown: Any = base64.b64encode(vector.tobytes()).decode() if ask.base64 else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    tokens = sum(answer.prompt_tokens for answer in answers)
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _usage(answers: Sequence[RequestOutput]) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in answers)
    drawn = sum(len(one.token_ids) for output in answers for one in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in answers)},
    }


def _pairs(one: CompletionOutput) -> Iterable[tuple[Logprob, Logprobs]]:
    """The token drawn and its alternatives, for every token."""
    for token, entry in zip(one.token_ids, one.logprobs or [], strict=False):
        yield entry[token], entry


def _best(entry: Logprobs, most: int) -> list[Logprob]:
    return sorted((one for one in entry.values() if one.rank <= most), key=lambda one: one.rank)


def _content(one: CompletionOutput, most: int) -> Iterable[dict[str, Any]]:
    for drawn, entry in _pairs(one):
        yield {**_shown(drawn), "top_logprobs": [_shown(other) for other in _best(entry, most)]}


def _shown(one: Logprob) -> dict[str, Any]:
    return {"token": one.decoded_token, "logprob": one.logprob, "bytes": list(one.decoded_token.encode())}


def _columns(one: CompletionOutput, most: int) -> dict[str, Any]:
    pairs = list(_pairs(one))
    tokens = [drawn.decoded_token for drawn, _ in pairs]
    return {
        "tokens": tokens,
        "token_logprobs": [drawn.logprob for drawn, _ in pairs],
        "top_logprobs": [{other.decoded_token: other.logprob for other in _best(entry, most)} for _, entry in pairs],
        "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
    }
