"""Which worker runs what next, where several answer one batch? Whole prefix groups, and again what a lost worker had.

Every worker has a share of the plan and takes half of what is left of it at a time (guided self-scheduling,
Polychronopoulos and Kuck 1987): few pieces, so that engines seldom run dry, and short ones at the end. One whose share
is used up takes from the share that has most left. What a lost worker had not answered comes back in two halves, so
that a request that ends its engine is alone after a few tries, and fails alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tersor.engine import groups, shares
from tersor.engine.batch_items import Item
from tersor.engine.groups import Plan
from tersor.engine.outputs import Answer, RequestOutput
from tersor.errors import TersorError

TRIES = 3
"""How often a request is run that is alone in its piece when its worker is lost."""

GUESSED_OUTPUT = 256
"""Tokens that an answer without `max_tokens` is expected to have."""

_WAIT = 0.1


@dataclass(frozen=True, slots=True)
class Done:
    """A worker has answered all that it began."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker ended before it had answered all.

    Attributes:
        reason: in a line.
        final: whether it does not come back.
    """

    reason: str
    final: bool = False


Event = Answer | Done | Lost


class Workers(Protocol):
    """Engines that run beside each other."""

    @property
    def count(self) -> int:
        """How many there are; they are called 0 to count - 1."""

    def begin(self, worker: int, items: list[Item]) -> None:
        """Have a worker that has nothing to do answer these."""

    def wait(self, seconds: float) -> list[tuple[int, Event]]:
        """Wait until something happens, at most so long, and return what did, by worker, in order."""

    def stop(self) -> None:
        """Have all workers begin no further item."""


class Dispatch:
    """The pieces of a plan that are not answered, by worker."""

    def __init__(self, plan: Plan, workers: int, *, token_cost: float = 1.0) -> None:
        """Begin with nothing handed out.

        Args:
            plan: of all requests.
            workers: how many.
            token_cost: what a token drawn costs, in prompt tokens.
        """
        costs = plan.lengths - plan.reused + token_cost * plan.outputs
        self._sums = np.concatenate([[0.0], np.cumsum(costs)])
        self._left = [deque(share.ranges) for share in shares.share_out(plan, workers, token_cost=token_cost)]
        self._again: deque[list[int]] = deque()
        self._running: list[set[int]] = [set() for _ in range(workers)]
        self._tries: dict[int, int] = {}

    @property
    def waiting(self) -> bool:
        """Whether there is something to hand out."""
        return bool(self._again) or any(self._left)

    def take(self, worker: int) -> list[int]:
        """Return the positions that a worker runs next, in the order of the plan; empty where nothing waits."""
        if self._again:
            piece = self._again.popleft()
        else:
            share = self._left[worker] or max(self._left, key=self._cost)
            half, piece = self._cost(share) / 2, []
            while share and (not piece or half > 0):
                start, stop = share.popleft()
                half -= float(self._sums[stop] - self._sums[start])
                piece += range(start, stop)
            piece.sort()
        self._running[worker] = set(piece)
        return piece

    def answered(self, worker: int, position: int) -> bool:
        """Note an answer, and return whether the worker still owed it."""
        owed = position in self._running[worker]
        self._running[worker].discard(position)
        return owed

    def lost(self, worker: int) -> list[int]:
        """Note that a worker was lost: what it owes is handed out again, but for what is returned, which failed."""
        owed = sorted(self._running[worker])
        self._running[worker] = set()
        if len(owed) == 1:
            self._tries[owed[0]] = self._tries.get(owed[0], 0) + 1
            if self._tries[owed[0]] >= TRIES:
                return owed
        middle = (len(owed) + 1) // 2
        self._again += [half for half in (owed[:middle], owed[middle:]) if half]
        return []

    def owes(self, worker: int) -> bool:
        """Whether a worker has not answered all that it was handed."""
        return bool(self._running[worker])

    def _cost(self, share: deque[tuple[int, int]]) -> float:
        return float(sum(self._sums[stop] - self._sums[start] for start, stop in share))


def run_over(workers: Workers, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
    """Yield the outputs of all items, each once, in the order in which workers finish them (`BatchEngine.run`).

    Raises:
        TersorError: no worker is left.
    """
    plan = groups.plan([item.tokens for item in items], [expected_output(item) for item in items])
    positions = {items[index].key: position for position, index in enumerate(plan.order.tolist())}
    dispatch = Dispatch(plan, workers.count)
    idle, busy, stopped, reason = set(range(workers.count)), set[int](), False, ""
    while True:
        if stopping() and not stopped:
            workers.stop()
            stopped = True
        for worker in sorted(idle if dispatch.waiting and not stopped else ()):
            piece = dispatch.take(worker)
            if piece:
                workers.begin(worker, [items[index] for index in plan.order[piece].tolist()])
                idle.discard(worker)
                busy.add(worker)
        if not busy:
            if dispatch.waiting and not stopped:
                raise TersorError(f"no worker is left: {reason}")
            return
        for worker, event in workers.wait(_WAIT):
            if isinstance(event, Answer):
                if dispatch.answered(worker, positions[event.request_id]):
                    yield event
                continue
            if isinstance(event, Done) and dispatch.owes(worker) and not stopped:
                event = Lost("the engine ended before it had answered all")
            busy.discard(worker)
            idle.add(worker)
            if isinstance(event, Lost):
                reason = event.reason
                if event.final:
                    idle.discard(worker)
                for position in dispatch.lost(worker):
                    yield _failed(items[int(plan.order[position])], reason)


def expected_output(item: Item) -> int:
    """Return how many tokens an item is expected to draw before anything was learnt."""
    return item.params.n * (item.params.max_tokens or GUESSED_OUTPUT) if item.params else 0


def _failed(item: Item, reason: str) -> Answer:
    error = f"its engine was lost {TRIES} times: {reason}"
    return item.answer(RequestOutput(item.key, None, item.tokens.tolist(), [], error=error))
