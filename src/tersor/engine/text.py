"""From tokens to text as they come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tersor.engine.token_texts import TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"
_CONTEXT = 8
"""Tokens of the prompt that the first piece is decoded with."""


class Detokenizer:
    """Turns tokens into pieces of text; the pieces together are the decoded whole.

    A piece is held back while it ends in the replacement character, that is in the middle of a multi-byte
    character. Every piece is decoded together with the piece before it, since a token's text can depend on
    its left neighbour (a leading space); the first piece is decoded with the end of the prompt. Where tokens
    are bytes and nothing else, the text of one that is whole characters is looked up.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._texts = TokenTexts.of(tokenizer, skip_special_tokens=skip_special_tokens)
        self._ids = list(prompt[-_CONTEXT:])
        self._before = 0  # _ids[_before:_shown] is the piece before, which gives context
        self._shown = len(self._ids)  # text up to here has been returned

    def add(self, token: int) -> None:
        """Add a token whose text can wait for the next one that is pushed, or for the end."""
        self._ids.append(token)

    def push(self, token: int) -> str:
        """Add a token and return the text that has become complete, possibly none."""
        alone = self._texts.joined and len(self._ids) == self._shown  # nothing is held back
        self._ids.append(token)
        text = self._texts[token] if alone else ""
        if not text or _BROKEN in text:
            text = self._pending()
        if not text or text.endswith(_BROKEN):
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """Return what is held back, broken characters as U+FFFD."""
        text = self._pending()
        self._before = self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        texts, context = self._texts, self._ids[self._before : self._shown]
        before = texts[context[0]] if len(context) == 1 else texts.together(context)
        return texts.together(self._ids[self._before :])[len(before) :]


class StopFilter:
    """Passes text on until one of the stop texts appears.

    Attributes:
        found: the stop text that appeared, the first in the text, or `None`.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text and return what can be shown: nothing that may begin a stop text, nothing after one."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        places = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            place, self.found = min(places)
            shown, self._held = self._held[:place], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        split = len(self._held) - keep
        shown, self._held = self._held[:split], self._held[split:]
        return shown

    def flush(self) -> str:
        """Return what is held back."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        place = self._held.find(stop[0], max(0, len(self._held) - len(stop) + 1))
        while place >= 0 and not stop.startswith(self._held[place:]):
            place = self._held.find(stop[0], place + 1)
        return len(self._held) - place if place >= 0 else 0
