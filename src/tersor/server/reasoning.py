"""Which part of an answer is reasoning? Text between `<think>` and `</think>` at its beginning."""

from __future__ import annotations

from tersor.server.events import Event, Parser, Reasoning
from tersor.server.markers import split_at

OPEN, CLOSE = "<think>", "</think>"


class ThinkParser:
    """Keeps reasoning apart; what follows goes to another parser. Blanks around the reasoning belong to nothing.

    An answer that does not begin with the marker has no reasoning: the marker inside a text is text.
    """

    def __init__(self, inner: Parser, prompt: str) -> None:
        """Begin; a `prompt` that ends in the opening marker has begun the reasoning itself."""
        self._inner, self._held = inner, ""
        self._state = "inside" if prompt.rstrip().endswith(OPEN) else "before"
        self._started = False  # reasoning was shown

    def push(self, text: str) -> list[Event]:
        """Add text; return what is certain."""
        if self._state == "after":
            return self._inner.push(text)
        self._held += text
        events: list[Event] = []
        if self._state == "before":
            begun = self._held.lstrip()
            if OPEN.startswith(begun) and begun != OPEN:
                return []
            if not begun.startswith(OPEN):
                return self._leave(self._held)
            self._state, self._held = "inside", begun[len(OPEN) :]
        if self._state == "inside":
            shown, marker, rest = split_at(self._held, [CLOSE])
            if marker is None:
                kept = shown.rstrip()
                self._held = shown[len(kept) :] + rest
                return self._reason(kept)
            events += self._reason(shown.rstrip())
            self._state, self._held = "gap", rest
        answer = self._held.lstrip()
        return events + self._leave(answer) if answer else events

    def end(self) -> list[Event]:
        """Return what was held back."""
        held, self._held = self._held, ""
        if self._state == "before":
            return [*self._leave(held), *self._inner.end()]
        if self._state == "inside":
            return self._reason(held.rstrip())
        return self._inner.end()

    def _reason(self, text: str) -> list[Event]:
        if not self._started:
            text = text.lstrip()
        self._started = self._started or bool(text)
        return [Reasoning(text)] if text else []

    def _leave(self, text: str) -> list[Event]:
        self._state, self._held = "after", ""
        return self._inner.push(text)
