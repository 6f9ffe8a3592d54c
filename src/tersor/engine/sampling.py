"""How is the next token drawn? The options of a generation, checked, with defaults from a model's generation config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tersor.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig

_SAMPLED = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of one generation; None takes the value of the model's generation config, and then the default.

    Sampling is on when a temperature above 0 or any of top_k, top_p, min_p is given, or when the generation
    config says `do_sample`; else decoding is greedy. Temperature 0 is greedy.

    Attributes:
        temperature: divides the logits; at least 0.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that together reach this probability, in (0, 1].
        min_p: keep tokens at least this fraction as probable as the most probable one, in [0, 1].
        repetition_penalty: divides the positive logits of tokens seen, prompt included, and multiplies the
            negative ones; above 0, 1 is off (Keskar et al. 2019, CTRL, section 4.1).
        seed: makes sampling repeatable; None draws a fresh one.
        max_new_tokens: stop after this many tokens; 256 when the generation config says nothing.
        stop: texts that end the generation; they are not part of the output.
        ignore_eos: go on past the end-of-sequence token.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        checks = (
            ("temperature", lambda v: 0 <= v < math.inf, "at least 0 (0 is greedy)"),
            ("top_k", lambda v: v >= 0, "at least 0 (0 keeps every token)"),
            ("top_p", lambda v: 0 < v <= 1, "above 0 and at most 1"),
            ("min_p", lambda v: 0 <= v <= 1, "between 0 and 1"),
            ("repetition_penalty", lambda v: 0 < v < math.inf, "above 0 (1 is off)"),
            ("seed", lambda v: 0 <= v < 2**63, "between 0 and 2^63 - 1"),
            ("max_new_tokens", lambda v: v >= 1, "at least 1"),
        )
        for name, legal, range_ in checks:
            value = getattr(self, name)
            if value is not None and not legal(value):
                raise InputError(f"{name} is {value}: it must be {range_}")
        if any(not text for text in self.stop):
            raise InputError("a stop text is empty: it would end every generation at once")

    def resolved(self, config: GenerationConfig | Mapping[str, Any]) -> Sampling:
        """Return these options with every None but the seed filled; greedy decoding has temperature 0.

        Args:
            config: the model's generation config, of transformers or as its generation_config.json has it.
        """

        def said(name: str) -> Any:
            return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

        asked = any(getattr(self, name) is not None for name in _SAMPLED) and self.temperature != 0
        if asked or (self.temperature is None and said("do_sample")):
            chosen = {name: _first(getattr(self, name), said(name)) for name in _SAMPLED}
        else:
            chosen = {"temperature": 0.0}
        return replace(
            self,
            temperature=float(_first(chosen.get("temperature"), 1.0)),
            top_k=int(_first(chosen.get("top_k"), 0)),
            top_p=float(_first(chosen.get("top_p"), 1.0)),
            min_p=float(_first(chosen.get("min_p"), 0.0)),
            repetition_penalty=float(_first(self.repetition_penalty, said("repetition_penalty"), 1.0)),
            max_new_tokens=int(_first(self.max_new_tokens, said("max_new_tokens"), 256)),
        )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
