"""What an answer is made of: pieces of its text, of its reasoning and of its calls, in the order they come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of a function; `index` counts the calls of an answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A fragment of the JSON arguments of a call."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A call that turned out to be none.

    Attributes:
        index: of the call that has begun.
        raw: its whole text.
        rest: what of it no fragment has shown.
    """

    index: int
    raw: str
    rest: str


Event = Text | Reasoning | CallBegins | Arguments | CallFailed


class Parser(Protocol):
    """Turns the text of an answer into events, in pieces of any length."""

    def push(self, text: str) -> list[Event]:
        """Add text; return what is certain."""

    def end(self) -> list[Event]:
        """Return what was held back."""


class Plain:
    """All is text."""

    def push(self, text: str) -> list[Event]:
        """Return the text."""
        return [Text(text)] if text else []

    def end(self) -> list[Event]:
        """Return nothing."""
        return []
