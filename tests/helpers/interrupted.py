"""Progress that ends a conversion while it is under way, as an interrupt would."""

from __future__ import annotations

from collections.abc import Callable


class Stopped(Exception):
    """What ends it."""


def after(share: float) -> Callable[[int, int, str], None]:
    """Return progress that stops where more than a share of all bytes is done."""

    def progress(done: int, total: int, name: str) -> None:
        if done > share * total:
            raise Stopped

    return progress


def at_call(number: int) -> Callable[[int, int, str], None]:
    """Return progress that stops when it is told so many times."""
    calls = 0

    def progress(done: int, total: int, name: str) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Stopped

    return progress
