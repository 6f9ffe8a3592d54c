"""A call of a function in JSON, read as it is written: its name first, its arguments in fragments."""

from __future__ import annotations

import json

_OUTSIDE = frozenset(' \t\n\r{}[],:"0123456789+-.eEtrufalsn')
"""What JSON holds outside strings."""
_BLANK = " \t\n\r"
_ARGUMENTS = ("arguments", "parameters")


class CallScanner:
    """Reads one JSON object: `{"name": ..., "arguments": {...}}`, or the arguments alone where the name is known.

    Attributes:
        raw: what was read.
        name: of the function, once it is known.
        shown: how many characters of `raw` are behind the last fragment returned.
        done: the object is complete and is a call.
        failed: it is not a call.
    """

    def __init__(self, name: str | None = None) -> None:
        self.raw, self.name, self.shown = "", name, 0
        self.done = self.failed = False
        self._whole = name is not None  # the object is the arguments
        self._stack: list[str] = []
        self._string: int | None = None  # where the string that is open begins
        self._escaped = self._value = False  # the value of `_key` comes next or has begun
        self._key = ""
        self._start: int | None = None  # arguments begin here ...
        self._stop: int | None = None  # ... and end here

    def push(self, text: str) -> tuple[str, str]:
        """Read on.

        Returns:
            (fragment, rest): the arguments that have become certain, and what is behind the object.
        """
        for count, letter in enumerate(text, 1):
            self._read(letter)
            if self.failed or self.done:
                return self._fragment(), text[count:]
        return self._fragment(), ""

    def _fragment(self) -> str:
        if self._start is None or self.name is None or self.failed:
            return ""
        begin = max(self.shown, self._start)
        end = len(self.raw) if self._stop is None else self._stop
        self.shown = max(begin, end)
        return self.raw[begin:end]

    def _read(self, letter: str) -> None:
        place = len(self.raw)
        self.raw += letter
        if self._string is not None:
            self._in_string(letter)
        elif letter not in _OUTSIDE or (not self._stack and letter != "{"):
            self.failed = True
        elif letter == '"':
            self._string = place
            if self._wants_arguments():
                self.failed = True  # arguments are an object
        elif letter in "{[":
            if letter == "{" and (self._wants_arguments() or (self._whole and not self._stack)):
                self._start = place
            self._stack.append(letter)
        elif letter in "}]":
            self._close(letter)
        elif len(self._stack) == 1 and letter == ":":
            self._value = True
        elif len(self._stack) == 1 and letter == ",":
            self._value = False
        elif letter not in _BLANK and self._wants_arguments():
            self.failed = True

    def _wants_arguments(self) -> bool:
        inside = len(self._stack) == 1 and self._value and not self._whole
        return inside and self._key in _ARGUMENTS and self._start is None

    def _in_string(self, letter: str) -> None:
        if self._escaped:
            self._escaped = False
        elif letter == "\\":
            self._escaped = True
        elif letter == '"':
            begin, self._string = self._string, None
            if len(self._stack) == 1 and not self._whole:
                try:
                    text = json.loads(self.raw[begin:])
                except ValueError:
                    self.failed = True
                    return
                if not self._value:
                    self._key = text
                elif self._key == "name":
                    self.name = text

    def _close(self, letter: str) -> None:
        if self._stack.pop() + letter not in ("{}", "[]"):
            self.failed = True
        elif self._start is not None and self._stop is None and len(self._stack) == (0 if self._whole else 1):
            self._stop = len(self.raw)
        if not self._stack and not self.failed:
            self._finish()

    def _finish(self) -> None:
        try:
            value = json.loads(self.raw)
        except ValueError:
            value = None
        called = value is not None and (self._whole or isinstance(value.get("name"), str))
        self.done, self.failed = called, not called
