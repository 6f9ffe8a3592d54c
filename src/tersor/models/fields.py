"""What does a config.json say? Its fields one by one, each checked as it is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from tersor.errors import UnsupportedError

_Kind = TypeVar("_Kind", int, float, bool, str)
_WORDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class Fields:
    """The fields of a config.json, or of a part of one; `null` counts as absent.

    Attributes:
        where: the part's name with a dot behind it, for messages; empty for the whole.
    """

    def __init__(self, raw: Mapping[str, Any], where: str = "") -> None:
        self._raw = raw
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._raw.get(name) is not None

    def size(self, name: str, default: int | None = None) -> int:
        """Return a whole number of at least 1.

        Raises:
            UnsupportedError: it is none, or it is missing and has no default.
        """
        value = self._of(name, int, default)
        if value < 1:
            raise self.refused(name, "a whole number of at least 1")
        return value

    def count(self, name: str, default: int) -> int:
        """Return a whole number of at least 0."""
        value = self._of(name, int, default)
        if value < 0:
            raise self.refused(name, "a whole number of at least 0")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number above 0."""
        value = self._of(name, float, default)
        if not 0 < value < float("inf"):
            raise self.refused(name, "a number above 0")
        return value

    def maybe_number(self, name: str, default: float | None = None) -> float | None:
        """Return a number above 0, or the default where the field is absent, `None` where it is null."""
        return self.number(name) if name in self else None if name in self._raw else default

    def maybe_size(self, name: str, default: int | None = None) -> int | None:
        """Return a whole number of at least 1, or the default where the field is absent, `None` where it is null."""
        return self.size(name) if name in self else None if name in self._raw else default

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        return self._of(name, bool, default)

    def word(self, name: str, default: str | None = None) -> str:
        """Return a text."""
        return self._of(name, str, default)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """Return so many numbers above 0."""
        values = self._raw.get(name)
        if not isinstance(values, list) or len(values) != count or not all(_is(value, float) for value in values):
            raise self.refused(name, f"{count} numbers")
        return tuple(float(value) for value in values)

    def words(self, name: str, count: int, known: Collection[str]) -> tuple[str, ...] | None:
        """Return so many texts out of the known ones, or `None` where the field is absent."""
        values = self._raw.get(name)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) < count or any(value not in known for value in values):
            raise self.refused(name, f"{count} of {', '.join(sorted(known))}")
        return tuple(values[:count])

    def indices(self, name: str) -> tuple[int, ...]:
        """Return whole numbers: one, several, or none where the field is absent."""
        values = self._raw.get(name)
        values = [] if values is None else values if isinstance(values, list) else [values]
        if not all(_is(value, int) for value in values):
            raise self.refused(name, "whole numbers")
        return tuple(values)

    def part(self, name: str) -> Fields | None:
        """Return the fields of an object in it, or `None` where it is absent."""
        value = self._raw.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refused(name, "an object")
        return Fields(value, f"{self.where}{name}.")

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse the config unless a field is absent or has one of these values.

        Raises:
            UnsupportedError: it has another.
        """
        value = self._raw.get(name)
        if value is not None and value not in allowed:
            raise self.refused(name, " or ".join(str(one) for one in allowed))

    def refused(self, name: str, expected: str) -> UnsupportedError:
        """Return the error that says what a field is, and what of it is understood."""
        found = f"{self._raw[name]!r:.60}" if name in self._raw else "missing"
        return UnsupportedError(f"config.json: {self.where}{name} is {found}: the engine takes {expected}")

    def _of(self, name: str, kind: type[_Kind], default: _Kind | None) -> _Kind:
        value: Any = self._raw.get(name)
        value = default if value is None else value
        if not _is(value, kind):
            raise self.refused(name, _WORDS[kind])
        return kind(value)


def _is(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a kind; true is no number, and a whole number may stand for any."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
