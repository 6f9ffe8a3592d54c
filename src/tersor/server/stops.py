"""Stop texts where reasoning is parsed: they end the answer, and mean nothing inside the reasoning."""

from __future__ import annotations

from collections.abc import Sequence

from tersor.server.events import Event, Parser, Text
from tersor.server.markers import split_at


class StopParser:
    """Hands text to another parser until a stop text appears.

    Attributes:
        found: the stop text that ended the answer, or `None`.
    """

    def __init__(self, inner: Parser, stops: Sequence[str], include: bool) -> None:
        """Begin; `include` says whether the stop text is part of the answer."""
        self._inner, self._stops, self._include, self._held = inner, stops, include, ""
        self.found: str | None = None

    def push(self, text: str) -> list[Event]:
        """Add text; return what is certain."""
        if self.found is not None:
            return []
        shown, self.found, self._held = split_at(self._held + text, self._stops)
        if self.found is not None and self._include:
            shown += self.found
        return self._inner.push(shown)

    def end(self) -> list[Event]:
        """Return what was held back."""
        held, self._held = ("" if self.found is not None else self._held), ""
        return [*self._inner.push(held), *self._inner.end()]


class TextStop:
    """The same behind a parser that knows itself what is text: its other events pass."""

    def __init__(self, outer: Parser, stops: StopParser) -> None:
        """Begin; texts of `outer` go through `stops`."""
        self._outer, self._stops = outer, stops

    def push(self, text: str) -> list[Event]:
        """Add text; return what is certain."""
        return self._through(self._outer.push(text))

    def end(self) -> list[Event]:
        """Return what was held back."""
        return [*self._through(self._outer.end()), *self._stops.end()]

    def _through(self, events: list[Event]) -> list[Event]:
        shown: list[Event] = []
        for event in events:
            if self._stops.found is None:
                shown += self._stops.push(event.text) if isinstance(event, Text) else [event]
        return shown
