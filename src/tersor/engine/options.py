"""Which options does a request have after all? A model's defaults fill what it left open.

Each of its continuations has a seed of its own, and tokens whose logits its penalties change.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import inf
from random import SystemRandom
from typing import Any

from tersor.engine.params import SamplingParams

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
NEWEST = -1
"""As in `ops.sampling_form`."""


def resolved(params: SamplingParams, config: Mapping[str, Any]) -> SamplingParams:
    """Return options of which every one that says how a token is drawn is filled.

    What a request leaves open is what the model's generation config says and, where it says nothing, off: a temperature
    of 1, all tokens kept, no penalty. Whether that config says `do_sample` does not matter: a request that wants the
    most probable token has temperature 0.

    Args:
        params: of the request.
        config: the model's generation_config.json; empty where it has none.
    """
    off: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    filled = {name: type(none)(_first(getattr(params, name), config.get(name), none)) for name, none in off.items()}
    return replace(params, **filled)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def seed_of(seed: int | None, index: int) -> int:
    """Return the seed of continuation `index` of a request, a number of 63 bits; a random one without a seed.

    Continuation 0 has the request's own, so that a request for several begins with what a request for one gives.
    """
    if seed is None:
        return SystemRandom().getrandbits(63)
    if not index:
        return seed
    word = (seed + index * _GOLDEN) & _WORD
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64
        word = (word ^ word >> bits) * factor & _WORD
    return (word ^ word >> 31) >> 1


class ListedTokens:
    """The tokens of one continuation whose logits are changed, as `ops.Listed` has them, kept from step to step.

    Attributes:
        tokens, counts: arrays of int32.
        biases: array of float32.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], stops: Collection[int]) -> None:
        """Begin with what is known before a token is drawn.

        Args:
            params: resolved.
            prompt: the tokens before.
            stops: tokens that end the text, which `min_tokens` forbids.
        """
        self.tokens, self.counts, self.biases = array("i"), array("i"), array("f")
        self._places: dict[int, int] = {}
        self._params, self._stops = params, tuple(stops) if params.min_tokens else ()
        self._counted, self._forbidden = 0, False
        self._repeats = params.repetition_penalty != 1
        self.counting = self._repeats or params.presence_penalty != 0 or params.frequency_penalty != 0
        if self.counting:
            self._add(NEWEST, 0)
        if self._repeats:
            seen, first = list(dict.fromkeys(prompt)), len(self.tokens)
            self._places.update(zip(seen, range(first, first + len(seen)), strict=True))
            self.tokens.extend(seen)
            self.counts.frombytes(bytes(4 * len(seen)))
            self.biases.frombytes(bytes(4 * len(seen)))
        for token, bias in params.logit_bias.items():
            self.biases[self._place(token)] = bias

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Tell whether options ever change the logits of single tokens."""
        counting = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        return counting or bool(params.logit_bias) or params.min_tokens > 0

    def update(self, output: Sequence[int], drawn: int) -> list[int]:
        """Count tokens that have become known, and return the places in the arrays that changed.

        Args:
            output: tokens drawn that the host knows.
            drawn: how many are drawn before the one that is drawn next.
        """
        changed: list[int] = []
        if self.counting and self._counted < len(output):
            for token in output[self._counted :]:
                place = self._place(token)
                self.counts[place] = max(self.counts[place], 0) + 1
                changed.append(place)
            self._counted = len(output)
        forbids = drawn < self._params.min_tokens
        if forbids != self._forbidden:
            for token in self._stops:
                place = self._place(token)
                self.biases[place] = -inf if forbids else self._params.logit_bias.get(token, 0.0)
                changed.append(place)
            self._forbidden = forbids
        return changed

    def _place(self, token: int) -> int:
        found = self._places.get(token)
        return self._add(token, -1) if found is None else found

    def _add(self, token: int, count: int) -> int:
        place = self._places[token] = len(self.tokens)
        self.tokens.append(token)
        self.counts.append(count)
        self.biases.append(0.0)
        return place
