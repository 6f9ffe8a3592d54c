"""The channels of gpt-oss: `analysis` is reasoning, `commentary to=functions.f` a call, all else text."""

from __future__ import annotations

import json
from collections.abc import Collection

from tersor.server.events import Arguments, CallBegins, CallFailed, Event, Reasoning, Text
from tersor.server.markers import split_at

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", START)
_TO, _FUNCTIONS = "to=functions.", "functions."


class HarmonyParser:
    """Reads messages of the form `<|channel|>KIND<|message|>TEXT<|end|><|start|>assistant<|channel|>...`."""

    def __init__(self, names: Collection[str]) -> None:
        """Begin; `names` are the functions that may be called."""
        self._names = names
        self._held = ""
        self._state = "begin"
        self._kind = "text"
        self._index = -1
        self._arguments = ""

    def push(self, text: str) -> list[Event]:
        """Add text; return what is certain."""
        self._held += text
        events: list[Event] = []
        while self._held:
            before = (self._state, len(self._held))
            events += {"begin": self._begin, "header": self._head, "body": self._body}[self._state]()
            if before == (self._state, len(self._held)):
                break
        return events

    def end(self) -> list[Event]:
        """Return what was held back; a header that was cut short is dropped, since it is no text."""
        held, self._held = self._held, ""
        events = self._piece(held) if held and self._state != "header" else []
        return events + self._close()

    def _begin(self) -> list[Event]:
        """An answer that begins with no channel is text."""
        begun = self._held.lstrip()
        if any(one.startswith(begun) and begun != one for one in (CHANNEL, _TO)):
            return []
        self._state = "header" if begun.startswith((CHANNEL, _TO)) else "body"
        return []

    def _head(self) -> list[Event]:
        header, marker, rest = split_at(self._held, [MESSAGE])
        if marker is None:
            return []
        self._held, self._state = rest, "body"
        words = header.partition(CHANNEL)[2].replace("<|", " <|").split() or ["final"]
        to = next((word.removeprefix("to=") for word in header.split() if word.startswith("to=")), "")
        to = to.partition("<|")[0]
        name = to.removeprefix(_FUNCTIONS)
        if to and name in self._names:
            self._kind, self._arguments = "call", ""
            self._index += 1
            return [CallBegins(self._index, name)]
        self._kind = "reasoning" if words[0] == "analysis" else "text"
        return []

    def _body(self) -> list[Event]:
        text, marker, self._held = split_at(self._held, _ENDS)
        events = self._piece(text) if text else []
        if marker is not None:
            events += self._close()
            self._state, self._kind = "header", "text"
        return events

    def _piece(self, text: str) -> list[Event]:
        if self._kind == "call":
            self._arguments += text
            return [Arguments(self._index, text)]
        return [Reasoning(text) if self._kind == "reasoning" else Text(text)]

    def _close(self) -> list[Event]:
        """A call whose arguments are no JSON was none."""
        if self._kind != "call":
            return []
        try:
            json.loads(self._arguments)
        except ValueError:
            return [CallFailed(self._index, self._arguments, "")]
        return []
