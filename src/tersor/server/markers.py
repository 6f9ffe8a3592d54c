"""Where in a text that still grows does a marker begin? What may begin one is held back."""

from __future__ import annotations

from collections.abc import Sequence


def split_at(text: str, markers: Sequence[str]) -> tuple[str, str | None, str]:
    """Split a text at the first of several markers, of two at one place the longer one.

    Returns:
        (before, marker, after); without a marker in it (safe, None, held), where `held` is the longest end of the text
        that may begin one.
    """
    found = [(place, -len(marker), marker) for marker in markers if (place := text.find(marker)) >= 0]
    if found:
        place, _, marker = min(found)
        return text[:place], marker, text[place + len(marker) :]
    keep = max((_overlap(text, marker) for marker in markers), default=0)
    return text[: len(text) - keep], None, text[len(text) - keep :]


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker` and is not all of it."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
