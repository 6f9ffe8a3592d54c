"""A model without numbers that runs steps of the scheduler, as a device would: in order, and read later.

What it stores for a token depends on the whole text up to it, and what it draws on everything stored for the text. So a
page that was shared wrongly, freed too early or never written changes what comes next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from tersor.engine.request import Request, Step
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
        self.computed = 0

    def launch(self, step: Step) -> list[int]:
        """Run a step and return what it drew, which a scheduler may be told much later."""
        size, pages, drawn, last = self.size, self.pages, [], []
        self.computed += step.tokens
        for row in step.rows:
            request, start = row.request, row.start
            end, table = start + row.count, request.pages
            tokens = request.tokens(start, end) if end <= request.known else [self.last[request.slot]]
            assert len(tokens) == row.count
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
