"""Settings of transformers that are others for a while: they are the process's, whose threads may change them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class Changed(Generic[_Value]):
    """A setting that is another one while anybody is inside; who leaves last puts back what who came first found."""

    def __init__(self, read: Callable[[], _Value], write: Callable[[_Value], None]) -> None:
        self._read, self._write = read, write
        self._guard = threading.Lock()
        self._found: list[_Value] = []  # by each who is inside; who came first is first

    @contextlib.contextmanager
    def to(self, value: _Value) -> Iterator[None]:
        """Have the setting be `value` in the context, the same for all who ask."""
        with self._guard:
            self._found.append(self._read())
            self._write(value)
        try:
            yield
        finally:
            with self._guard:
                before = self._found.pop()
                if not self._found:
                    self._write(before)
