"""How does an engine answer prompts that are all known? In the plan's order, with nothing evicted that is still needed.

    for output in OfflineEngine(core).run(items, lambda: False): ...

`groups.plan` says who shares what. Requests are handed to the core one by one, as they are expected to fit in its pages
together, or to be worth it though they do not (`forecast`), so that few of them wait there; one that loses its pages
has some again on the same terms. A shared prefix is pinned from its first request to its last.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tersor.engine import groups
from tersor.engine.admission import whenever
from tersor.engine.batch_items import Item
from tersor.engine.core import Core
from tersor.engine.dispatch import expected_output
from tersor.engine.forecast import PATIENCE, Admission, OutputLengths
from tersor.engine.garbage import left_alone
from tersor.engine.outputs import Answer, RequestOutput
from tersor.engine.request import PREEMPTED, Request
from tersor.errors import TersorError

SPARE = 4
"""One more for so many rows is handed over, to begin while a prefix that others wait for is computed."""


class OfflineEngine:
    """A `BatchEngine` over a core that nobody else feeds. It runs equal questions twice (see `answer_once`).

    Attributes:
        core: what answers.
        plan: of the last run.
        plan_seconds: that it took to make.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self.plan: groups.Plan | None = None
        self.plan_seconds = 0.0
        self._lengths = OutputLengths()

    def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
        """Yield the outputs of all items, in the order in which they finish; one that cannot be served says so.

        Raises:
            TersorError: the engine fails.
        """
        begun = time.perf_counter()
        limits = self.core.scheduler.limits
        most = np.array([_most(item, limits.context) for item in items], dtype=np.int64)
        expected = np.minimum(most, [expected_output(item) for item in items])
        self.plan = plan = groups.plan([item.tokens for item in items], expected, page=limits.page_size)
        pages = self.core.scheduler.cache.pages.usable
        rows = np.array([item.rows for item in items], dtype=np.int64)
        admission = Admission(plan, pages, most[plan.order], self._lengths, rows=rows[plan.order])
        job = _Job(self.core, items, plan, admission)
        self.plan_seconds = time.perf_counter() - begun
        try:
            with left_alone():
                while job.go_on(stopping()):
                    yield from job.refused()
                    for output in self.core.step(partial=False):
                        item = job.ended(output)
                        if item is not None:
                            yield item.answer(output)
                yield from job.refused()
        finally:
            job.close()


def _most(item: Item, context: int) -> int:
    """Tokens that an item may draw, of all its continuations."""
    if item.params is None:
        return 0
    room = max(1, context - item.tokens.size)
    return item.params.n * min(room, item.params.max_tokens or room)


class _Job:
    """One run of a plan: which positions the core has, and which prefixes are pinned."""

    def __init__(self, core: Core, items: Sequence[Item], plan: groups.Plan, admission: Admission) -> None:
        self._core, self._items, self._plan, self._admission = core, items, plan, admission
        rows = core.scheduler.limits.max_rows
        self._most_rows = rows + rows // SPARE
        self._next = 0
        self._rows = 0  # of the positions that the core has
        self._open: dict[str, int] = {}
        self._drawn: dict[int, int] = {}
        self._pinned: dict[int, array[int]] = {}
        self._refused: list[Answer] = []
        self._wait = self._wait_away = 0
        self._stopped = False
        core.scheduler.admission.may_return = self._may_return

    def go_on(self, stop: bool) -> bool:
        """Hand over what fits, or nothing more where it is to stop; return whether the core has anything to do."""
        if stop and not self._stopped:
            self._stopped = True
            for name in [name for name in self._open if not self._core.begun(name)]:
                self._core.abort(name)
                self._forget(name)
        if not self._stopped:
            self._feed()
        return bool(self._open) or self._core.unfinished

    def refused(self) -> list[Answer]:
        """Return outputs of requests that the core did not take, once."""
        refused, self._refused = self._refused, []
        return refused

    def ended(self, output: RequestOutput) -> Item | None:
        """Note that a request has ended; return its item, or `None` where it is none of this run that still counts."""
        position = self._open.get(output.request_id)
        if position is None:
            return None
        self._drew(position, sum(len(one.token_ids) for one in output.outputs))
        self._forget(output.request_id)
        return self._item(position)

    def close(self) -> None:
        """Leave the core as it was: nothing of this run in it, and nothing pinned."""
        for name in list(self._open):
            self._core.abort(name)
        while self._core.unfinished:
            self._core.step(partial=False)
        for tokens in self._pinned.values():
            self._core.scheduler.unpin(tokens)
        self._pinned.clear()
        self._core.scheduler.admission.may_return = whenever

    def _feed(self) -> None:
        if self._core.scheduler.admission.preempted:
            return  # they go first
        if self._wait and self._open:
            self._wait -= 1
            return
        count, known = self._plan.order.size, False
        while self._next < count and self._rows < self._most_rows:
            if self._open:
                if not known:
                    self._look()
                    known = True
                if not self._admission.admits(self._next):
                    self._wait = PATIENCE
                    return
            self._begin(self._next)
            self._next += 1

    def _begin(self, position: int) -> None:
        item = self._item(position)
        self._admission.admit(position)
        self._drawn[position] = 0
        self._open[item.key] = position
        self._rows += item.rows
        for node in self._plan.path(position):
            if node not in self._pinned:
                self._pinned[node] = prefix = _unsigned(item.tokens[: self._plan.depths[node]])
                self._core.scheduler.pin(prefix)
        try:
            self._core.add(item.key, _unsigned(item.tokens), item.params)
        except TersorError as error:
            refused = RequestOutput(item.key, None, item.tokens.tolist(), [], error=str(error))
            self._refused.append(item.answer(refused))
            self._forget(item.key)

    def _item(self, position: int) -> Item:
        return self._items[int(self._plan.order[position])]

    def _may_return(self, request: Request, found: int) -> bool:
        """Whether a request that was preempted is to go on, as `Admission.may_return`."""
        if self._wait_away:
            self._wait_away -= 1
            return False
        self._look()
        position = self._open.get(request.id)
        if position is None:
            return True
        away = sum(one.state == PREEMPTED for one in self._core.requests(request.id))
        prompt = max(0, len(request.prompt) - found * self._plan.page)  # the first that returns computes it for all
        if self._admission.returns(position, prompt // away + len(request.output)):
            return True
        self._wait_away = PATIENCE
        return False

    def _look(self) -> None:
        """Tell the forecast what was drawn since it was asked last, and who has no pages."""
        for name, position in self._open.items():
            requests = self._core.requests(name)
            drawn = [len(one.output) for one in requests]
            self._drew(position, sum(drawn))
            having = [
                count
                for one, count in zip(requests, drawn, strict=True)
                if one.state != PREEMPTED and one.finish_reason is None
            ]
            self._admission.stands(position, len(having), -(-sum(having) // max(1, len(having))))
        self._admission.lost(len(self._core.scheduler.admission.preempted))

    def _drew(self, position: int, drawn: int) -> None:
        self._admission.drew(position, drawn - self._drawn[position])
        self._drawn[position] = drawn

    def _forget(self, name: str) -> None:
        """Let a request go, and prefixes that were for it alone."""
        position = self._open.pop(name)
        del self._drawn[position]
        self._rows -= self._item(position).rows
        self._wait = self._wait_away = 0
        for node in self._admission.end(position):
            self._core.scheduler.unpin(self._pinned.pop(node))


def _unsigned(tokens: np.ndarray) -> array[int]:
    """Return tokens as requests hold them."""
    return array("I", tokens.astype(np.uint32).tobytes())
