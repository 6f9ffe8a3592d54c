"""How full is the engine, and how much did prefixes save? Numbers for metrics and progress."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
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

    def ended(self) -> EngineStats:
        """Return what is left of them when the engine has ended: what only grows."""
        return EngineStats(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=self.preemptions,
        )


ANSWERS, STARTS, LOST = "answers", "starts", "lost"
"""How a copy stands: it answers; its process loads the model; its process has ended and is not started again."""


@dataclass(frozen=True, slots=True)
class CopyStats:
    """One of several copies of a model.

    Attributes:
        state: `ANSWERS`, `STARTS` or `LOST`.
        requests: that it has and that have not ended.
        load: tokens that it is expected to compute for them (`balance`).
        engine: its engine; what one counted that was lost counts on.
    """

    state: str
    requests: int
    load: int
    engine: EngineStats


def total(engines: Iterable[EngineStats]) -> EngineStats:
    """Return the numbers of several engines together."""
    found = list(engines)
    return EngineStats(**{one.name: sum(getattr(each, one.name) for each in found) for one in fields(EngineStats)})


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
