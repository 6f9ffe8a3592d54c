"""What does continuing one prompt begin with, when does it end, what is its text, and what did it take?"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tersor.engine.text import Detokenizer, StopFilter
from tersor.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REASONS = ("eos", "stop", "length", "context")


@dataclass(kw_only=True)
class Statistics:
    """What a stream took; filled in while it runs, complete when it ends.

    Attributes:
        prompt_tokens: tokens read.
        samples: continuations of the prompt.
        new_tokens: tokens drawn, the end-of-sequence token included; of all samples together.
        prefill_seconds: from the call until every sample has its first token on the host.
        capture_seconds: warming up and capturing CUDA graphs; 0 when no graph was made for this stream.
        decode_seconds: wall clock of the tokens after these, the consumer's own time included.
        tokens_per_second: of the tokens after these; None without any.
        finish_reason: "eos", "stop", "length" (max_new_tokens) or "context" (the model's positions are used); of
            several samples every one that occurred, in this order, such as "eos, length".
        cuda_graph: whether the decode step was a CUDA graph.
        eager_reason: why it was not.
    """

    prompt_tokens: int
    samples: int = 1
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    capture_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens_per_second: float | None = None
    finish_reason: str | None = None
    cuda_graph: bool = False
    eager_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)


class TextStream(Iterator[str]):
    """Pieces of text, and the `statistics` and `tokens` (ids drawn so far) of the stream they come from."""

    def __init__(self, prompt_tokens: int) -> None:
        self.statistics = Statistics(prompt_tokens=prompt_tokens)
        self.tokens: list[int] = []
        self.pieces: Iterator[str] = iter(())

    def __next__(self) -> str:
        return next(self.pieces)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int], vocabulary: int) -> list[int]:
    """Return the tokens of a prompt; of an empty one the token that texts begin with.

    Args:
        tokenizer: of the model.
        prompt: a text or token ids.
        vocabulary: tokens that the model has.

    Raises:
        InputError: no token at all, or one that the model does not have.
    """
    ids = list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt)
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise InputError("the prompt is empty and the tokenizer has no token to begin with: give a text")
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocabulary:
            raise InputError(f"the prompt holds token {token}, the model has {vocabulary}: another tokenizer?")
    return ids


def room_for(tokens: int, most: int, context: int | None) -> int:
    """Return how many tokens can be drawn after a prompt of so many: up to `most`, and what the context holds.

    Raises:
        InputError: there is no room.
    """
    room = most if context is None else min(most, context - tokens)
    if room < 1:
        raise InputError(f"the prompt has {tokens} tokens, the model {context} positions: shorten the prompt")
    return room


def full(most: int | None, room: int) -> str:
    """Return why a continuation ends that takes all the room there is, where `most` tokens were asked for."""
    return "length" if room == most else "context"


def together(reasons: Iterable[str | None]) -> str:
    """Return why several continuations ended, in one line."""
    found = set(reasons)
    return ", ".join(reason for reason in _REASONS if reason in found)


class Continuation:
    """The tokens and the text of one continuation of a prompt.

    Attributes:
        tokens: ids drawn so far, that of an end-of-sequence token included.
        text: what is complete of their text so far, all of it at the end; a stop text is no part of it.
        finish_reason: `None` while it goes on; then "eos", "stop", or what `end` was given.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], eos: Collection[int], stops: Sequence[str]
    ) -> None:
        """Begin one.

        Args:
            tokenizer: of the model.
            prompt: the tokens before it.
            eos: tokens that end it.
            stops: texts that end it, which are no part of it.
        """
        self._text, self._stops, self._eos = Detokenizer(tokenizer, prompt), StopFilter(stops), eos
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """Add a token and return the text that has become complete, possibly none."""
        self.tokens.append(token)
        if token in self._eos:
            self.finish_reason = "eos"
            return ""
        piece = self._stops.push(self._text.push(token))
        if self._stops.found:
            self.finish_reason = "stop"
        self.text += piece
        return piece

    def end(self, reason: str) -> str:
        """Return the text held back; `reason` is why it ends, where nothing in it did."""
        self.finish_reason = self.finish_reason or reason
        rest = ""
        if not self._stops.found:
            rest = self._stops.push(self._text.flush())
            if self._stops.found:
                self.finish_reason = "stop"
            else:
                rest += self._stops.flush()
        self.text += rest
        return rest

    def to_dict(self) -> dict[str, Any]:
        """Return text, tokens and the reason of the end as a dictionary that JSON can hold."""
        return {"text": self.text, "tokens": self.tokens, "finish_reason": self.finish_reason}
