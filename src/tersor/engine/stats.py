"""How full is the engine, and how much did prefixes save? Numbers for metrics and progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tersor.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Stats:
    """A scheduler at one moment.

    Attributes:
        running: requests that have pages.
        waiting: requests that have none: new, delayed and preempted ones.
        pages: that there are for requests.
        pages_held: by requests.
        pages_cached: held by nobody, with a text that may come again.
        pages_pinned: of those, the ones that a pin keeps.
        pages_free: the others.
        prompt_tokens: of all prompts that have begun, so far.
        cached_tokens: of them, those whose pages were there.
        drawn_tokens: read so far.
        preemptions: so far.
    """

    running: int
    waiting: int
    pages: int
    pages_held: int
    pages_cached: int
    pages_pinned: int
    pages_free: int
    prompt_tokens: int
    cached_tokens: int
    drawn_tokens: int
    preemptions: int


def stats(scheduler: Scheduler) -> Stats:
    """Return the numbers of a scheduler, without looking at its requests."""
    cache, pages = scheduler.cache, scheduler.cache.pages
    return Stats(
        running=scheduler.limits.max_rows - len(scheduler.free_slots),
        waiting=len(scheduler.admission),
        pages=pages.usable,
        pages_held=pages.usable - pages.free - cache.cached,
        pages_cached=cache.cached,
        pages_pinned=cache.pinned,
        pages_free=pages.free,
        prompt_tokens=scheduler.prompt_tokens,
        cached_tokens=scheduler.cached_tokens,
        drawn_tokens=scheduler.drawn_tokens,
        preemptions=scheduler.preemptions,
    )
