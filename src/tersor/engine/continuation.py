"""When does a continuation end, and what is its text? One row of tokens, from the first to the last."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from tersor.engine.text import Detokenizer, StopFilter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
