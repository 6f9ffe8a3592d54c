"""Which copy of a model answers the next request? The one that is expected to be done with it first.

What a copy has to do is counted in tokens: of the prompts that it has not read yet, and `ROW` for every answer that
grows, however long it is, since an answer that goes on is expected to go on. What a request adds is its prompt less the
tokens at its beginning that the copy holds: the conversation so far, a system prompt. So a copy that holds a prefix is
preferred while it has at most so many tokens more to do as the prefix saves; beyond that, others are done sooner.
Among equals whoever was chosen longest ago is next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from tersor.engine import prefix
from tersor.engine.dispatch import GUESSED_OUTPUT

ROW = GUESSED_OUTPUT
"""Tokens that an answer under way is expected to draw yet."""


def choose(loads: Sequence[int], shared: Sequence[int], chosen: Sequence[int]) -> int:
    """Return the place of the copy that is to answer.

    Args:
        loads: tokens that each has to compute.
        shared: tokens of the prompt that each holds.
        chosen: when each was chosen last, by any clock.
    """
    return min(range(len(loads)), key=lambda place: (loads[place] - shared[place], chosen[place]))


def pages_of(tokens: Sequence[int], salt: str | None, page: int) -> list[bytes]:
    """Return the digest of every full page of a text, as a prefix cache knows them (`prefix`)."""
    last, found = prefix.root(salt), []
    for start in range(0, len(tokens) - page + 1, page):
        last = prefix.digest(last, tokens[start : start + page])
        found.append(last)
    return found


class Held:
    """Pages that a copy is expected to hold: those of texts that it was given, the newest ones first.

    What the copy itself evicts is not known here: this forgets alike, the end of a text before its beginning, and where
    it is wrong a prompt is read once more.
    """

    def __init__(self, most: int) -> None:
        """Begin with none; `most` is how many the copy has room for."""
        self._most = most
        self._pages: OrderedDict[bytes, None] = OrderedDict()  # the one that is forgotten next comes first

    def shared(self, pages: Iterable[bytes]) -> int:
        """Return how many of the first pages of a text there are."""
        count = 0
        for one in pages:
            if one not in self._pages:
                break
            count += 1
        return count

    def note(self, pages: Sequence[bytes]) -> None:
        """Count the pages of a text as held."""
        for one in reversed(pages):
            self._pages[one] = None
            self._pages.move_to_end(one)
        while len(self._pages) > self._most:
            self._pages.popitem(last=False)
