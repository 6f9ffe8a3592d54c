"""How full is the engine, and how much did prefixes save? Numbers for metrics and progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tersor.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine at one moment; counts of tokens and of preemptions only grow.

    Attributes:
        running: requests that have pages.
        waiting: requests that have none: new, delayed and preempted ones.
        pages_used: that a request holds.
        pages_free: the others; their sum never changes.
        pages_cached: of the free ones, those with a text that may come again.
        pages_pinned: of those, the ones that a pin keeps.
        prompt_tokens: of all prompts that have begun.
        cached_tokens: of them, those whose keys and values were there already.
        generated_tokens: tokens drawn.
        preemptions: times that a request lost its pages before it had ended.
    """

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_pinned: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


def stats(scheduler: Scheduler) -> EngineStats:
    """Return the numbers of a scheduler, without looking at its requests."""
    cache, pages = scheduler.cache, scheduler.cache.pages
    free = pages.free + cache.cached
    return EngineStats(
        running=scheduler.limits.max_rows - len(scheduler.free_slots),
        waiting=len(scheduler.admission),
        pages_used=pages.usable - free,
        pages_free=free,
        pages_cached=cache.cached,
        pages_pinned=cache.pinned,
        prompt_tokens=scheduler.prompt_tokens,
        cached_tokens=scheduler.cached_tokens,
        generated_tokens=scheduler.drawn_tokens,
        preemptions=scheduler.preemptions,
    )
