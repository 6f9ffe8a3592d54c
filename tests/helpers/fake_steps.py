"""A model without numbers that runs steps of the scheduler, as a device would: in order, and read later.

What it stores for a token depends on the whole text up to it, and what it draws on everything stored for the text. So a
page that was shared wrongly, freed too early or never written changes what comes next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tersor.engine.limits import Limits
from tersor.engine.params import SamplingParams
from tersor.engine.request import Request, Step, continuations
from tersor.engine.scheduler import Scheduler

VOCABULARY = 6
END = 0
"""The token that ends a text, where a request says so."""


def next_token(stored: Sequence[int], seed: int) -> int:
    """Return what is drawn after a text of which this is stored."""
    return hash((seed, *stored)) % 1009 % VOCABULARY


def solo(request: Request, length: int) -> list[int]:
    """Return the tokens that a request draws when it runs alone, up to a text of `length` tokens."""
    stored, before = [], 0
    for token in request.prompt:
        before = hash((before, token))
        stored.append(before)
    drawn: list[int] = []
    while len(stored) < length:
        token = next_token(stored, request.index)
        drawn.append(token)
        if token in request.stop_tokens:
            break
        before = hash((before, token))
        stored.append(before)
    return drawn


class Device:
    """Pages of keys and values, and the last token drawn in every slot."""

    def __init__(self, scheduler: Scheduler) -> None:
        limits = scheduler.limits
        self.size = limits.page_size
        self.pages = [[0] * limits.page_size for _ in range(limits.pages)]
        self.last = [0] * limits.max_rows
        self.given: dict[Request, list[int]] = {}  # positions whose logits were given, of those who want several

    def launch(self, step: Step) -> list[int]:
        """Run a step and return what it drew, which a scheduler may be told much later."""
        size, pages, drawn, last = self.size, self.pages, [], []
        for row in step.rows:
            request, start = row.request, row.start
            end, table = start + row.count, request.pages
            tokens = request.tokens(start, end) if end <= request.known else [self.last[request.slot]]
            assert len(tokens) == row.count
            assert request.ahead or not row.draws or end <= request.known
            if request.params.prompt_logprobs is not None:
                given = range(end - row.logits, end)
                assert all(place < len(request.prompt) - 1 for place in given[: row.logits - row.draws])
                self.given.setdefault(request, []).extend(given)
            else:
                assert row.logits == row.draws
            before = pages[table[(start - 1) // size]][(start - 1) % size] if start else 0
            for place, token in enumerate(tokens, start):
                before = hash((before, token))
                pages[table[place // size]][place % size] = before
            if row.draws:
                stored: list[int] = []
                for page in table[: -(-end // size)]:
                    stored += pages[page]
                del stored[end:]
                token = next_token(stored, request.index)
                drawn.append(token)
                last.append((request.slot, token))
        for slot, token in last:
            self.last[slot] = token
        return drawn


class Loop:
    """The loop of an engine: a step is launched before the one before it is read, `depth` at a time."""

    def __init__(self, scheduler: Scheduler, depth: int = 2) -> None:
        self.scheduler = scheduler
        self.device = Device(scheduler)
        self.depth = depth
        self.under_way: deque[tuple[Step, list[int]]] = deque()
        self.steps: list[Step] = []
        self.between: Callable[[], object] = lambda: None  # called when a step is launched and none read yet

    def turn(self) -> bool:
        """Launch one step if one can run, read one if so many are under way; return whether anything was done."""
        step = self.scheduler.schedule()
        self.scheduler.audit()
        if step is not None:
            self.steps.append(step)
            self.under_way.append((step, self.device.launch(step)))
        self.between()
        if self.under_way and (step is None or len(self.under_way) >= self.depth):
            before, drawn = self.under_way.popleft()
            self.scheduler.finish(before, drawn)
            self.scheduler.audit()
            return True
        return step is not None

    def run(self, most: int = 10_000) -> None:
        """Go on until everybody has ended; who cannot go on is an error."""
        for _ in range(most):
            if not self.scheduler.unfinished and not self.under_way:
                return
            assert self.turn(), "nothing can run, and nothing is under way"
        raise AssertionError(f"after {most} steps {self.scheduler.unfinished} requests have not ended")


def scheduler(**limits: Any) -> Scheduler:
    """One with pages of four tokens, and room enough for whatever is not said."""
    return Scheduler(Limits(**{"pages": 65, "page_size": 4, "max_rows": 8, "context": 200, **limits}))


def add(to: Scheduler, id: str, prompt: list[int], max_tokens: int | None = 4, **options: Any) -> Request:
    """Add a request with one continuation and return it."""
    fields = {
        name: options.pop(name) for name in ("stop_tokens", "salt", "priority", "ahead", "embeds") if name in options
    }
    (request,) = continuations(id, prompt, SamplingParams(max_tokens=max_tokens, **options), **fields)
    to.add(request)
    return request


def planned(step: Step | None) -> list[tuple[str, int, int, bool]]:
    """The rows of a step."""
    assert step is not None
    return [(row.request.id, row.start, row.count, row.draws) for row in step.rows]


def prompt_of(length: int, first: int = 1) -> list[int]:
    """A prompt of so many tokens, which begins as no other with another `first`."""
    return [first] + [1 + place % 5 for place in range(length - 1)]
