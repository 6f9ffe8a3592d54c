"""Which part of an answer calls a function? The forms in which models write calls, read as they are written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tersor.server.events import Arguments, CallBegins, CallFailed, Event, Text
from tersor.server.markers import split_at
from tersor.server.scanner import CallScanner


@dataclass(frozen=True, slots=True)
class Form:
    """How calls are written.

    Attributes:
        opens: text before calls.
        closes: text behind a call; it may be missing.
        between: characters around calls that mean nothing, beside blanks.
        at_start: whether an answer may begin with a call, without `opens`.
        bare_names: whether a name may stand before an object that is the arguments (`f[ARGS]{...}`).
        named: the function that every object is the arguments of.
        special: whether `opens` is a special token, which the text must show.
    """

    opens: str | None = None
    closes: str | None = None
    between: str = ""
    at_start: bool = False
    bare_names: bool = False
    named: str | None = None
    special: bool = False


FORMS = {
    "hermes": Form(opens="<tool_call>", closes="</tool_call>"),
    "llama3": Form(opens="<|python_tag|>", between=";,", at_start=True, special=True),
    "mistral": Form(opens="[TOOL_CALLS]", between="[,]", bare_names=True, special=True),
}
"""By the name of a tool parser: Hermes and Qwen, Llama 3's JSON, Mistral's two."""

LISTED = Form(between="[,]", at_start=True)
"""What the grammar of a required call writes: a list of calls."""

_ARGUMENTS, _ID = "[ARGS]", "[CALL_ID]"
_BLANK = " \t\n\r"


class ToolParser:
    """Keeps calls apart from text. What begins like a call and is none, or calls what is no tool, is text.

    Blanks between a text and a call, and around calls, belong to nothing.
    """

    def __init__(self, form: Form, names: Collection[str]) -> None:
        """Begin; `names` are the functions that there are."""
        self._form, self._names = form, names
        self._held = ""
        self._state = "start" if form.at_start else "text"
        self._blank = ""  # behind the text shown: shown before more text, dropped before a call
        self._prefix = ""  # what was read since the last text or call: text where no call follows
        self._scanner: CallScanner | None = None
        self._begun = False
        self._calls = 0
        self._called = False  # one of them was whole

    def push(self, text: str) -> list[Event]:
        """Add text; return what is certain."""
        self._held += text
        events: list[Event] = []
        while self._held:
            before = (self._state, len(self._held))
            events += {"text": self._text, "start": self._start, "between": self._between, "call": self._call}[
                self._state
            ]()
            if before == (self._state, len(self._held)):
                break
        return events

    def end(self) -> list[Event]:
        """Return what was held back; a call that was cut short is none."""
        held, self._held = self._held, ""
        if self._state == "call":
            assert self._scanner is not None
            events = self._failed(self._scanner)
            return [*events, Text(self._blank)] if self._blank else events
        rest = self._blank + self._prefix + held
        if self._called and not (rest.strip(_BLANK + self._form.between)):
            return []
        return [Text(rest)] if rest else []

    def _shown(self, text: str) -> list[Event]:
        """Text, without the blanks at its end until more comes."""
        text, self._blank, self._prefix = self._blank + text, "", ""
        kept = text.rstrip(_BLANK)
        self._blank = text[len(kept) :]
        return [Text(kept)] if kept else []

    def _text(self) -> list[Event]:
        if self._form.opens is None:
            text, self._held = self._held, ""
            return self._shown(text)
        text, marker, self._held = split_at(self._held, [self._form.opens])
        events = self._shown(text) if text else []
        if marker is not None:
            self._state, self._prefix = "between", marker
        return events

    def _start(self) -> list[Event]:
        begun = self._held.lstrip(_BLANK)
        opens = self._form.opens or ""
        if not begun or (opens.startswith(begun) and begun != opens):
            return []
        called = begun.startswith(("{", *self._form.between))
        self._state = "between" if called else "text"
        return []

    def _between(self) -> list[Event]:
        form = self._form
        rest = self._held.lstrip(_BLANK)
        self._prefix += self._held[: len(self._held) - len(rest)]
        self._held = rest
        if not rest:
            return []
        for marker in filter(None, (form.opens, form.closes)):
            if rest.startswith(marker):
                self._held = rest[len(marker) :]
                closed = marker == form.closes and self._begun
                self._prefix = "" if closed else self._prefix + marker
                self._state = "text" if closed else "between"
                self._begun = False
                return []
            if marker.startswith(rest):
                return []
        if rest[0] in form.between:
            self._prefix, self._held = self._prefix + rest[0], rest[1:]
            return []
        if rest.startswith("{"):
            return self._begin(form.named)
        if form.bare_names and not self._begun:
            return self._bare_name(rest)
        self._state = "text"
        return [] if self._begun_then_nothing() else self._shown(self._prefix)

    def _begun_then_nothing(self) -> bool:
        """Whether only blanks and separators stand behind a call; they are dropped."""
        behind = self._begun
        self._begun = False
        if behind:
            self._prefix = ""
        return behind

    def _bare_name(self, rest: str) -> list[Event]:
        name, marker, _ = split_at(rest, [_ID, _ARGUMENTS, "{"])
        if marker is None:
            if any(letter in _BLANK for letter in name):
                self._state = "text"
                return self._shown(self._prefix)
            return []
        place = rest.find("{")
        if place < 0:
            return []
        self._prefix += rest[:place]
        self._held = rest[place:]
        return self._begin(name.strip())

    def _begin(self, name: str | None) -> list[Event]:
        self._scanner, self._state, self._begun = CallScanner(name), "call", False
        return self._call()

    def _call(self) -> list[Event]:
        scanner = self._scanner
        assert scanner is not None
        fragment, self._held = scanner.push(self._held)
        events: list[Event] = []
        if scanner.name is not None and not self._begun and scanner.name not in self._names:
            scanner.failed = True
        elif scanner.name is not None and not self._begun and not scanner.failed and (fragment or scanner.done):
            self._begun = True
            events.append(CallBegins(self._calls, scanner.name))
        if fragment and self._begun:
            events.append(Arguments(self._calls, fragment))
        if scanner.failed:
            return events + self._failed(scanner)
        if scanner.done:
            if scanner.shown == 0:
                events.append(Arguments(self._calls, "{}"))
            self._calls, self._called = self._calls + 1, True
            self._state, self._prefix, self._blank = "between", "", ""
        return events

    def _failed(self, scanner: CallScanner) -> list[Event]:
        raw, rest = self._prefix + scanner.raw, scanner.raw[scanner.shown :]
        self._state = "text"
        if not self._begun:
            return self._shown(raw)
        self._begun, self._prefix = False, ""
        self._calls += 1
        return [CallFailed(self._calls - 1, raw, rest)]
