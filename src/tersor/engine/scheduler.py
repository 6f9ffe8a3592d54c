"""Which tokens of which requests does the next step compute? A state machine that knows neither torch nor a device.

    step = scheduler.schedule()          # of step N + 1, or with P stages N + P
    scheduler.finish(before, drawn)      # the tokens that step N drew

Batching is continuous (Orca, OSDI 2022) over pages (PagedAttention, arXiv 2309.06180), with prompts in chunks beside
decoding rows (Sarathi-Serve, arXiv 2403.02310). A step is planned before the tokens of the one before it are known.
What cannot be known then is that a token ended its text, that a stop text did, or that the client left: the row of the
step that is under way is then dropped, and the pages go back when that step is finished. Where a text reaches its
greatest length is known, and no row is planned after it.

When pages run out, the request that needs one takes those of the younger one that has least to compute again; the
oldest is never a victim, and while a victim waits nobody else is admitted, so that every request comes to its end.
Pages of requests that leave count as free: who needs one sits out until they are.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from operator import attrgetter

from tersor.engine import prefix
from tersor.engine.admission import Admission, growth
from tersor.engine.audit import audit
from tersor.engine.limits import Limits
from tersor.engine.outputs import ABORT, LENGTH, STOP
from tersor.engine.pages import Pages
from tersor.engine.prefix import PrefixCache
from tersor.engine.request import GONE, LEAVING, NEVER, PREEMPTED, RUNNING, Request, Row, Step
from tersor.engine.turns import Turns
from tersor.engine.waiting import Order, by_priority
from tersor.errors import InputError, TersorError

_BY_ORDER = attrgetter("order")


class Scheduler:
    """Plans steps. One thread calls it.

    Attributes:
        limits: that it stays within.
        cache: who hands out pages.
        admission: requests without pages.
        running: requests that get rows, the oldest first; some of another state may be among them until the next step.
        leaving: requests that get no more rows and have some under way.
        steps: scheduled and not finished, the oldest first.
        unfinished: requests that have not ended.
        prompt_tokens, cached_tokens, drawn_tokens, preemptions: so far (`stats.py`).
    """

    def __init__(self, limits: Limits, order: Order = by_priority) -> None:
        """Begin with no requests.

        Args:
            limits: of a step and of all requests.
            order: what requests are sorted by; arrival decides among equals.
        """
        self.limits = limits
        self.cache = PrefixCache(Pages(limits.pages, limits.page_size))
        self.admission = Admission(self.cache)
        self.running: list[Request] = []
        self.leaving: set[Request] = set()
        self.steps: deque[Step] = deque()
        self.unfinished = 0
        self.prompt_tokens = self.cached_tokens = self.drawn_tokens = self.preemptions = 0
        self._order, self._arrivals, self._turns = order, 0, Turns(limits.stages)
        self._live: dict[str, list[Request]] = {}
        self._slots = list(range(limits.max_rows - 1, -1, -1))
        self._stale = False  # whether one that is not running may be in `running`
        self._preempted: list[Request] = []  # since the last step
        self._victims: list[Request] | None = None  # those who may be preempted in this step, the first one last

    def add(self, request: Request) -> None:
        """Take a request in; it waits.

        Raises:
            InputError: it has no prompt, can never fit, or one of the same id and index is there.
        """
        name, prompt, expected = request.id, len(request.prompt), request.expected_tokens
        limit, need = self.extent(name, prompt, request.most_tokens)
        same = self._live.get(name, [])
        if any(one.index == request.index for one in same):
            raise InputError(f"{name}: there is a request of this id already")
        self._arrivals += 1
        if self.limits.share_prefixes:
            request.root = prefix.root(request.salt)
        else:
            request.root = same[0].root if same else prefix.root_of_one(self._arrivals)
        request.order = (self._order(request), self._arrivals)
        request.length, request.limit, request.most_pages = prompt, limit, need
        request.expected_pages = self.cache.pages.needed(prompt + expected) if expected else 0
        if request.params.prompt_logprobs is not None and request.index == 0 and prompt > 1:
            request.logits_from = 0
        self._live.setdefault(name, []).append(request)
        self.unfinished += 1
        self.admission.add(request)

    def extent(self, name: str, prompt: int, most: int | None) -> tuple[int, int]:
        """Return how many tokens the text of a request may have, and how many pages it needs for them.

        Args:
            name: of the request.
            prompt: tokens of its prompt.
            most: tokens that it may draw; `None` is what there is room for, 0 asks for its last state alone.

        Raises:
            InputError: it has no prompt, or can never fit.
        """
        limits, pages = self.limits, self.cache.pages
        if not prompt:
            raise InputError(f"{name}: the prompt has no tokens")
        if prompt + (most != 0) > limits.context:
            raise InputError(f"{name}: the prompt has {prompt} tokens, and the context is {limits.context}")
        limit = max(limits.storable if most is None else min(prompt + most, limits.context), prompt + 1)
        need = pages.needed(limit - 1)
        if need > pages.usable:
            raise InputError(
                f"{name}: a prompt of {prompt} tokens and up to {max(limit - prompt, 1)} more need {need} pages of "
                f"{pages.size} tokens, and there are {pages.usable}"
            )
        return limit, need

    def abort(self, id: str) -> None:
        """End all continuations of an id, if there are any."""
        for request in list(self._live.get(id, ())):
            self.end(request, ABORT)

    def end(self, request: Request, reason: str) -> None:
        """End a request; nothing happens to one that has ended. A token that is under way is dropped."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        self.unfinished -= 1
        same = self._live[request.id]
        same.remove(request)
        if not same:
            del self._live[request.id]
        if request.state == RUNNING:
            self._leave(request)
        if request.state != LEAVING:
            self.admission.remove(request)
            request.state = GONE
        elif not request.in_flight:
            self._release(request)

    def schedule(self) -> Step | None:
        """Plan a step, or return `None` where nothing can run before a step that is under way is finished."""
        if self._stale:
            self.running = [request for request in self.running if request.state == RUNNING]
            self._stale = False
        self._victims = None
        step, waiting = Step(), len(self.admission.preempted)
        rows, prompts = step.rows, []
        for request in self._turns.next(self.running):
            start = request.computed
            if request.state != RUNNING:
                continue
            if request.length - start != 1:
                prompts.append(request)
                continue
            if (request.in_flight and not request.ahead) or (start >= request.room and not self._grow(request, step)):
                continue
            rows.append(Row(request, start, 1, 1, True))
            request.computed = start + 1
            request.length += 1
            request.in_flight += 1
            if request.length == request.limit:
                self._leave(request)
        step.decodes = len(rows)
        step.drawing = rows.copy()
        budget = self.limits.max_step_tokens - len(rows)
        for request in prompts:
            if budget:
                budget -= self._chunk(request, budget, step)
        if len(self.admission.preempted) == waiting:
            budget = self._admit(budget, step)
        step.tokens = self.limits.max_step_tokens - budget
        if not rows:
            return None
        step.preempted, self._preempted = self._preempted, []
        self.steps.append(step)
        self._turns.made += 1
        return step

    def finish(self, step: Step, drawn: Sequence[int]) -> list[int]:
        """Take what a step drew.

        Args:
            step: the oldest that is not finished. Of one that failed, the requests are ended first: then nothing that
                it should have stored is ever found.
            drawn: one token for each of `step.drawing`.

        Returns:
            The places in `drawn` whose tokens count: the last of the `output` of `step.drawing[place].request`, which
            has a `finish_reason` now if it ended. The others belong to requests that had ended before.
        """
        if not self.steps or self.steps[0] is not step:
            raise TersorError("steps are finished in the order in which they were scheduled")
        if len(drawn) != len(step.drawing):
            raise TersorError(f"{len(drawn)} tokens are handed in for {len(step.drawing)} rows that draw")
        self.steps.popleft()
        counted, place = [], -1
        for row in step.rows:
            request = row.request
            request.in_flight -= 1
            if row.draws:
                place += 1
            if request.finish_reason is not None:
                if not request.in_flight and request.state == LEAVING:
                    self._release(request)
                continue
            computed = row.start + row.count
            if computed >= request.publish_at:
                self.admission.publish(request, computed)
            if row.draws:
                token = drawn[place]
                request.output.append(token)
                counted.append(place)
                if token in request.stop_tokens:
                    self.end(request, STOP)
                elif request.known == request.limit:
                    self.drawn_tokens -= request.embeds
                    self.end(request, STOP if request.embeds else LENGTH)
        self.drawn_tokens += len(counted)
        return counted

    def pin(self, tokens: Sequence[int], salt: str | None = None) -> None:
        """Keep the full pages of a prefix, those that are to be computed yet as well, until it is unpinned.

        A pinned page goes only where a request could not run even alone without it.
        """
        self.cache.pin(self._chain(tokens, salt))

    def unpin(self, tokens: Sequence[int], salt: str | None = None) -> None:
        """Let pages go that `pin` has kept: they are the next to be evicted."""
        self.cache.unpin(self._chain(tokens, salt))

    def audit(self) -> None:
        """Check that everything has one owner and adds up (`audit.py`); a `TersorError` says what does not."""
        audit(self)

    @property
    def free_slots(self) -> Sequence[int]:
        """Slots that nobody has."""
        return self._slots

    def everybody(self) -> Iterator[Request]:
        """Yield every request that has not ended."""
        for same in self._live.values():
            yield from same

    def _chain(self, tokens: Sequence[int], salt: str | None) -> list[bytes]:
        chain, size = [prefix.root(salt)], self.cache.pages.size
        for start in range(0, len(tokens) // size * size, size):
            chain.append(prefix.digest(chain[-1], tokens[start : start + size]))
        return chain[1:]

    def _chunk(self, request: Request, budget: int, step: Step) -> int:
        """Plan the next tokens of a request's text, as many as the budget allows; return how many."""
        start = request.computed
        count = min(budget, request.length - start)
        if request.logits_from is not None:
            count = min(count, self.limits.max_prompt_logits - step.prompt_logits)
            if not count:
                return 0
        end = start + count
        draws = end == request.length
        logits = int(draws)
        if request.logits_from is not None:
            logits = max(end - max(start, request.logits_from), 0)
            request.logits_from = max(request.logits_from, end) if end < len(request.prompt) - 1 else None
            step.prompt_logits += logits
        row = Row(request, start, count, logits, draws)
        step.rows.append(row)
        request.computed, request.turn = end, self._turns.made
        request.in_flight += 1
        if draws:
            step.drawing.append(row)
            request.length += 1
            if request.length == request.limit:
                self._leave(request)
        return count

    def _admit(self, budget: int, step: Step) -> int:
        """Let requests begin while there are tokens, slots and pages; return the tokens left."""
        if not budget or not self._slots or not (self.admission.waiting or self.admission.preempted):
            return budget
        having = [request for request in self.running if request.state == RUNNING]
        reserved = sum([growth(request, len(request.pages)) for request in having])
        alone = not having and not self.leaving
        while budget and self._slots:
            entry = self.admission.next(reserved, alone=alone)
            if entry is None or entry[0].length > entry[0].known:  # its newest token is in the slot that it had
                break
            request, found = entry
            self.admission.begin(request, found)
            self.cache.hold(found)
            need = self.cache.pages.needed(request.length) - len(found)
            request.pages = found + self.cache.take(need, pinned_too=alone)
            request.room = len(request.pages) * self.cache.pages.size
            request.computed = len(found) * self.cache.pages.size
            request.publish_at = request.computed + self.cache.pages.size
            if request.state != PREEMPTED:
                request.num_cached = request.computed
                self.prompt_tokens += len(request.prompt)
                self.cached_tokens += request.computed
            request.state, request.slot = RUNNING, self._slots.pop()
            insort(self.running, request, key=_BY_ORDER)
            step.grown.append(request)
            budget -= self._chunk(request, budget, step)
            reserved, alone = reserved + growth(request, len(request.pages)), False
        return budget

    def _grow(self, request: Request, step: Step) -> bool:
        """Get a page for the next token; return whether there is one. What it takes may preempt, itself as well."""
        alone = False
        while not self.cache.available and not alone:
            if any(self._private(one) for one in self.leaving):
                return False
            victim = self._victim(request)
            if victim is not None:
                self._preempt(victim)
                if victim is request:
                    return False
            alone = victim is None
        request.pages += self.cache.take(1, pinned_too=alone)
        request.room += self.cache.pages.size
        step.grown.append(request)
        return True

    def _victim(self, request: Request) -> Request | None:
        """Return the younger request that has least to compute again, else the request itself, unless it is oldest.

        Who needs a page is asked by age in a step, so they are ranked once, and who is passed over is never asked for
        again.
        """
        running, size = self.running, self.cache.pages.size
        if self._victims is None:
            ranked = []
            for place, one in enumerate(running):
                private = self._private(one)
                ranked.append((private == 0, one.computed - (len(one.pages) - private) * size, -place))
            self._victims = [running[-place] for _, _, place in sorted(ranked, reverse=True)]
        while self._victims:
            one = self._victims.pop()
            if one.state == RUNNING and one.order > request.order:
                return one
        oldest = next(one for one in running if one.state == RUNNING)
        return None if oldest is request else request

    def _private(self, request: Request) -> int:
        """Pages that nobody holds but this request; those that it shares are before them."""
        holders, pages = self.cache.pages.holders, request.pages
        shared = 0
        while shared < len(pages) and holders[pages[shared]] > 1:
            shared += 1
        return len(pages) - shared

    def _preempt(self, request: Request) -> None:
        """Take a running request's pages; what it has drawn, or draws in a step under way, is kept."""
        self._free(request)
        request.state, request.computed, request.publish_at = PREEMPTED, 0, NEVER
        self.admission.add(request)
        self.preemptions += 1
        self._stale = True
        self._preempted.append(request)

    def _leave(self, request: Request) -> None:
        """Plan no more rows of a running request."""
        request.state = LEAVING
        self.leaving.add(request)
        self._stale = True

    def _release(self, request: Request) -> None:
        """Take back what a request has whose last row is finished."""
        self.leaving.remove(request)
        request.state = GONE
        self._free(request)

    def _free(self, request: Request) -> None:
        self.admission.withdraw(request)
        self.cache.release(request.pages)
        self._slots.append(request.slot)
        request.pages, request.room, request.slot = [], 0, -1
