"""What does a request ask for? How its tokens are drawn and when it ends, under the names that vLLM's users know."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tersor.errors import InputError

MOST_LOGPROBS = 20
"""Tokens whose log probabilities a request may have beside that of the token drawn."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Options of one request, checked. What is `None` is what the model's generation config says, and else off.

    Attributes:
        n: how many continuations, at least 1; with a seed, continuation i draws with a seed made of it and i.
        max_tokens: tokens drawn at most, at least 1; `None` is what the context holds.
        min_tokens: no end-of-sequence or stop token is drawn before so many.
        temperature: divides the logits, at least 0; 0 is greedy; 1 where nobody says.
        top_k: the k most probable tokens are kept; 0 and -1 keep all.
        top_p: the most probable tokens that together reach this probability are kept, in (0, 1].
        min_p: tokens at least this fraction as probable as the most probable one are kept, in [0, 1].
        repetition_penalty: divides positive logits of tokens seen, prompt included, multiplies negative ones; above 0
            (Keskar et al. 2019, CTRL, section 4.1).
        presence_penalty: is subtracted from the logits of tokens that were drawn before, in [-2, 2].
        frequency_penalty: is subtracted from them as many times as they were drawn, in [-2, 2].
        logit_bias: token -> what is added to its logit.
        seed: makes draws repeatable in any batch; `None` draws a fresh one.
        stop: texts that end a continuation.
        stop_token_ids: tokens that end it, beside those of the model.
        include_stop_str_in_output: whether the text keeps the stop text that ended it.
        ignore_eos: go on past the model's end-of-sequence tokens.
        logprobs: log probabilities of so many most probable tokens beside that of each token drawn, up to 20; 0 is that
            of the token drawn alone, `None` none.
        prompt_logprobs: the same of the prompt's tokens.
        skip_special_tokens: whether special tokens are left out of the text.
        grammar: what the text must match, or `None`: `{"json_schema": ...}`, `{"json_object": True}`,
            `{"regex": ...}`, `{"ebnf": ...}` or `{"choice": [...]}`.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    grammar: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str | int) else tuple(value or ()))
        for name, legal, range_ in _RANGES:
            value = getattr(self, name)
            if value is None:
                continue
            kind, called = _KINDS.get(name, (numbers.Real, "a number"))
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"{name} is {value!r}: it must be {called}, {range_}")
            if not legal(value):
                raise InputError(f"{name} is {value}: it must be {range_}")
        for text in self.stop:
            if not isinstance(text, str):
                raise InputError(f"stop holds {text!r}: it must be a text, or texts (tokens go into stop_token_ids)")
        for token in self.stop_token_ids:
            if not isinstance(token, numbers.Integral):
                raise InputError(f"stop_token_ids holds {token!r}: it must be tokens")
        if any(not text for text in self.stop):
            raise InputError("a stop text is empty: it would end every generation at once")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens is {self.min_tokens}: more than max_tokens, {self.max_tokens}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0


_WHOLE = (numbers.Integral, "a whole number")
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"), _WHOLE),
    "logit_bias": (Mapping, "a mapping of tokens to numbers"),
}
"""What a value is, where that is no plain number."""

_LARGEST = float(np.finfo(np.float32).max)
"""Of numbers as the device has them; whole ones of Python have no end."""

_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("n", lambda v: v >= 1, "at least 1"),
    ("max_tokens", lambda v: v >= 1, "at least 1"),
    ("min_tokens", lambda v: v >= 0, "at least 0"),
    ("temperature", lambda v: 0 <= v <= _LARGEST, "at least 0 (0 is greedy), and finite in float32"),
    ("top_k", lambda v: v >= -1, "at least 1, or 0 or -1 (which keep every token)"),
    ("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("min_p", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ("repetition_penalty", lambda v: 0 < v <= _LARGEST, "above 0 (1 is off), and finite in float32"),
    ("presence_penalty", lambda v: -2 <= v <= 2, "between -2 and 2"),
    ("frequency_penalty", lambda v: -2 <= v <= 2, "between -2 and 2"),
    ("seed", lambda v: 0 <= v < 2**63, "between 0 and 2^63 - 1"),
    ("logprobs", lambda v: 0 <= v <= MOST_LOGPROBS, f"between 0 and {MOST_LOGPROBS}"),
    ("prompt_logprobs", lambda v: 0 <= v <= MOST_LOGPROBS, f"between 0 and {MOST_LOGPROBS}"),
    ("logit_bias", lambda v: all(abs(bias) <= _LARGEST for bias in v.values()), "finite in float32 for every token"),
)
