"""One answer as it grows: what is new since it was last looked at, and when it ends."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tersor.engine.outputs import ABORT, LENGTH, CompletionOutput, Logprobs
from tersor.errors import TersorError
from tersor.server.events import CallBegins, CallFailed, Event, Parser
from tersor.server.stops import StopParser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 8
"""Tokens of the prompt that the first token's text may depend on."""


@dataclass(slots=True)
class News:
    """What is new of an answer.

    Attributes:
        events: what its text turned out to be.
        tokens: new tokens, and `logprobs` those of each where asked for.
        finish_reason: `None` while it goes on; "stop", "length" or "tool_calls".
    """

    events: list[Event] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: str | None = None


class Choice:
    """Follows one continuation.

    Attributes:
        count: tokens of the answer so far.
        ended: whether nothing more is taken from it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        parser: Parser,
        watch: StopParser | None = None,
        *,
        one_call: bool = False,
        skip_special: bool = True,
    ) -> None:
        """Begin.

        Args:
            tokenizer, prompt: of the request.
            parser: reads the text.
            watch: finds stop texts on the parser's way, where the engine looks for none.
            one_call: whether the answer ends behind its first call.
            skip_special: whether special tokens are left out of the text.
        """
        self._tokenizer, self._prompt, self._parser, self._watch = tokenizer, prompt, parser, watch
        self._one_call, self._skip_special = one_call, skip_special
        self._seen = 0
        self._calls: set[int] = set()
        self._second = False  # a second call came where there may be one
        self.count, self.ended = 0, False

    def update(self, output: CompletionOutput) -> News:
        """Return what is new in an output, which holds all there is so far.

        Raises:
            TersorError: the engine gave the request up.
        """
        news = News()
        if self.ended:
            return news
        if output.finish_reason == ABORT:
            raise TersorError("the engine gave the request up")
        text, count, reason = output.text[self._seen :], len(output.token_ids), output.finish_reason
        self._seen = len(output.text)
        cut = self._read(text, news)
        if cut is not None:
            count, reason = min(count, self._tokens_of(output.token_ids, self._seen - len(text) + cut)), "stop"
        news.tokens = output.token_ids[self.count : count]
        if output.logprobs is not None:
            news.logprobs = output.logprobs[self.count : count]
        self.count = max(self.count, count)
        if reason is not None:
            if not self._second:
                self._note(self._parser.end(), news)
            self.ended = True
            news.finish_reason = "length" if reason == LENGTH else "tool_calls" if self._calls else "stop"
        return news

    def _read(self, text: str, news: News) -> int | None:
        """Hand text to the parser; return how much of it was read where the answer ends in it."""
        if self._watch is None and not self._one_call:
            self._note(self._parser.push(text), news)
            return None
        for place, letter in enumerate(text, 1):
            self._note(self._parser.push(letter), news)
            if self._second:
                return place - 1
            if self._watch is not None and self._watch.found is not None:
                return place
        return None

    def _note(self, events: list[Event], news: News) -> None:
        """Add events, up to a second call where there may be one."""
        for event in events:
            if isinstance(event, CallBegins):
                if self._one_call and self._calls:
                    self._second = True
                    return
                self._calls.add(event.index)
            elif isinstance(event, CallFailed):
                self._calls.discard(event.index)
            news.events.append(event)

    def _tokens_of(self, tokens: list[int], length: int) -> int:
        """How many tokens it takes to write so many characters."""
        before = list(self._prompt[-_CONTEXT:])
        start = len(self._decode(before))
        return bisect_left(range(len(tokens)), length, key=lambda n: len(self._decode(before + tokens[:n])) - start)

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special, clean_up_tokenization_spaces=False)
        )
