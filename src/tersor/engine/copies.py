"""Several copies of a model, each an engine in a process of its own: `protocol.AsyncEngine` over all of them.

This process has no model. It hands every request to the copy that is done with it first (`balance`) and puts together
what that copy tells. A copy that is lost ends its own requests with an error: none is asked again, since it may be why.
The copy is started again (`children`), and the others answer meanwhile. Of each process a thread reads and a thread
sends, so that none that hangs keeps the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from tersor.engine.balance import ROW, Held, choose, pages_of
from tersor.engine.boxes import Box, Boxes
from tersor.engine.children import RESTARTS, Children
from tersor.engine.news import News, begun, grow
from tersor.engine.one_copy import Abort, Ask, Asked, Check, Checked, Failed, Load, Ready, Step, work
from tersor.engine.outputs import RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.protocol import ModelInfo
from tersor.engine.stats import ANSWERS, LOST, STARTS, CopyStats, EngineStats, total
from tersor.errors import InputError, LostError, TersorError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GRACE = 10.0
"""Seconds that processes have to end before they are made to."""

_CLOSED = "the engine is closed"


@dataclass(slots=True)
class _Open:
    """A request under way.

    Attributes:
        output: all that was told of it.
        unread: tokens of its prompt that are to be computed, until the first one is drawn.
        rows: answers that grow.
    """

    output: RequestOutput
    box: Box
    unread: int
    rows: int


@dataclass(slots=True, eq=False)
class _Copy:
    """A process, from its start to its end.

    Attributes:
        asked: what is to be sent to it.
        state: as `CopyStats` has it.
        open: its requests by name; only the event loop touches them, and `load` and `held`.
        load: tokens that they have to be computed.
        held: pages that it has.
        checks: grammars that it compiles, by number.
        stats, before: of its engine, and what those counted that had its number before.
        failed: why it says that it ends.
    """

    number: int
    link: Connection
    before: EngineStats
    asked: queue.SimpleQueue[Asked] = field(default_factory=queue.SimpleQueue)
    state: str = STARTS
    open: dict[str, _Open] = field(default_factory=dict)
    load: int = 0
    held: Held = field(default_factory=lambda: Held(0))
    checks: dict[int, Future[None]] = field(default_factory=dict)
    stats: EngineStats = field(default_factory=EngineStats)
    failed: Failed | None = None

    @property
    def counted(self) -> EngineStats:
        """Its engine, with what was counted before."""
        return total((self.stats, self.before))


class Copies:
    """Answers many requests at once; see `protocol.AsyncEngine`, whose methods these are. To be ended."""

    def __init__(
        self,
        load: Load,
        count: int,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        *,
        say: Callable[[str], None] = lambda line: None,
        restarts: int = RESTARTS,
        parents: bool = False,
    ) -> None:
        """Start the copies, and wait until all have loaded the model.

        Args:
            load: loads the model of each, by its number.
            count: how many.
            tokenizer: loads that of this process, meanwhile.
            say: told in a line of a copy that is lost, and of one that answers again.
            restarts: how often each is started again.
            parents: whether each starts processes of its own, as the ranks of a model are.

        Raises:
            InputError: the model cannot be loaded so.
            TersorError: a copy cannot be started.
        """
        self.count = count
        self._say, self._boxes = say, Boxes()
        self._children = Children(work, (load,), restarts=restarts, parents=parents)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()  # of starting and ending processes
        self._closing, self._begun = False, False
        self._gone: set[int] = set()  # copies that are not started again
        self._greetings: queue.SimpleQueue[Ready | TersorError] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._numbers, self._clock = itertools.count(), itertools.count(1)
        self._chosen = [0] * count
        self._copies: list[_Copy] = []
        try:
            for number in range(count):
                self._copies.append(self._follow(number, self._children.start(number), EngineStats()))
            made = tokenizer()
            for _ in range(count):
                word = self._greetings.get()
                if isinstance(word, TersorError):
                    raise word
                self._page, self._shares = word.page, word.shares
                self._info = ModelInfo(word.name, word.context, word.vocabulary, made)
            with self._lock:
                self._begun = True
            if not self._greetings.empty() and isinstance(late := self._greetings.get(), TersorError):
                raise late  # it ended since it was ready
        except BaseException:
            self.end()
            raise

    @property
    def info(self) -> ModelInfo:
        """The model."""
        return self._info

    @property
    def healthy(self) -> bool:
        """Whether a copy answers, or is about to."""
        return not self._closing and len(self._gone) < self.count

    def stats(self) -> EngineStats:
        """Return how all engines stand together."""
        return total(one.counted for one in self._copies)

    def copies(self) -> Sequence[CopyStats]:
        """Return how each copy stands."""
        found = []
        for one in self._copies:
            state = STARTS if one.state == LOST and one.number not in self._gone else one.state
            found.append(CopyStats(state, len(one.open), one.load, one.counted))
        return found

    def check_grammar(self, grammar: Mapping[str, Any]) -> None:
        """Compile a grammar in every copy that answers, or refuse it."""
        waits = []
        for copy in self._copies:
            if copy.state == ANSWERS:
                number, found = next(self._numbers), Future[None]()
                copy.checks[number] = found
                copy.asked.put(Check(number, grammar))
                waits.append(found)
                if copy.state == LOST:  # meanwhile
                    _give_up(copy)
        for found in waits:
            found.result()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None,
        *,
        request_id: str,
        salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Answer one prompt."""
        if not self.healthy:
            raise LostError(_CLOSED if self._closing else "all copies of the model have ended")
        self._loop = asyncio.get_running_loop()
        prompt = list(prompt_token_ids)
        copy, shared = self._place(prompt, salt)
        box = self._boxes.open(request_id)
        rows = 0 if params is None else params.n
        opened = _Open(begun(request_id, prompt, params), box, max(len(prompt) - shared, 1), rows)
        copy.open[request_id] = opened
        copy.load += opened.unread + ROW * rows
        copy.asked.put(Ask(request_id, prompt, params, salt))
        ended = False
        try:
            while not ended:
                latest = await box.next()
                ended = latest.finished
                yield latest
        finally:
            self._boxes.close(request_id)
            if copy.open.pop(request_id, None) is not None:
                copy.load -= opened.unread + ROW * rows
            if not ended:
                copy.asked.put(Abort(request_id))
            elif params is not None and self._shares:
                copy.held.note(pages_of(prompt + latest.outputs[0].token_ids, salt, self._page))

    async def abort(self, request_id: str) -> None:
        """End a request within a step."""
        for copy in self._copies:
            if request_id in copy.open:
                copy.asked.put(Abort(request_id))

    async def close(self) -> None:
        """End every request and all processes."""
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """End all processes, those that hang as well; idempotent, and any thread may ask."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        for copy in self._copies:
            copy.asked.put(None)
        try:
            self._children.wait(_GRACE)
            for thread in self._threads:
                thread.join()
        finally:  # also where somebody interrupts
            self._children.close()

    def _place(self, prompt: list[int], salt: str | None) -> tuple[_Copy, int]:
        """Return the copy that is to answer, and how many tokens of the prompt it holds.

        Raises:
            TersorError: there is none at this moment.
        """
        there = [one for one in self._copies if one.state == ANSWERS]
        there = there or [one for one in self._copies if one.state == STARTS]
        if not there:
            raise LostError("all copies of the model have ended, and are started again")
        pages = pages_of(prompt, salt, self._page) if self._shares else []
        shared = [one.held.shared(pages) * self._page for one in there]
        place = choose([one.load for one in there], shared, [self._chosen[one.number] for one in there])
        copy = there[place]
        self._chosen[copy.number] = next(self._clock)
        copy.held.note(pages)
        return copy, shared[place]

    def _follow(self, number: int, link: Connection, before: EngineStats) -> _Copy:
        """Return a process that was just started, with the threads that speak with it."""
        copy = _Copy(number, link, before)
        for target in (self._read, self._send):
            thread = threading.Thread(target=target, args=(copy,), name=f"tersor copy {number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return copy

    def _send(self, copy: _Copy) -> None:
        """Send what is asked of a copy, until it is to end or has ended."""
        while (asked := copy.asked.get()) is not None:
            try:
                copy.link.send(asked)
            except OSError:  # `_read` sees that it has ended
                return
        try:
            copy.link.send(None)
        except OSError:
            return

    def _read(self, copy: _Copy) -> None:
        """Pass on what a copy tells until it ends."""
        try:
            while True:
                word = copy.link.recv()
                if isinstance(word, Step):
                    copy.stats = word.stats
                    self._post(self._deliver, copy, word.news)
                elif isinstance(word, Ready):
                    self._ready(copy, word)
                elif isinstance(word, Checked):
                    found = copy.checks.pop(word.number, None)
                    if found is not None:  # else who asked was let go: the copy has said that it ends
                        _answer(found, word.error)
                else:
                    copy.failed, copy.state = word, LOST
        except (EOFError, OSError):
            pass
        finally:
            self._lost(copy)

    def _ready(self, copy: _Copy, word: Ready) -> None:
        copy.held = Held(word.stats.pages_free)
        copy.stats, copy.state = word.stats, ANSWERS
        if self._begun:
            self._say(f"copy {copy.number} of {self.count} answers again")
        else:
            self._greetings.put(word)

    def _lost(self, copy: _Copy) -> None:
        """See to it that nobody waits for a copy that has ended, and start it again."""
        copy.state, copy.stats = LOST, copy.stats.ended()
        copy.asked.put(None)
        _give_up(copy)
        with self._lock:
            if self._closing:
                self._greetings.put(LostError(_CLOSED))
                self._post(self._end_open, copy, LostError(_CLOSED))
                return
            failed, how = copy.failed, self._children.lost(copy.number)
            why = "" if failed is None else f": {failed.line}"
            error: TersorError = LostError(f"copy {copy.number} of {self.count} ended{how}{why}")
            if not self._begun:
                self._greetings.put(InputError(failed.line) if failed is not None and failed.usage else error)
                return
            again = self._children.again(copy.number)
            if again:
                self._copies[copy.number] = self._follow(copy.number, self._children.links[copy.number], copy.counted)
            else:
                self._gone.add(copy.number)
        open_ = "1 request" if len(copy.open) == 1 else f"{len(copy.open)} requests"
        then = "is started again" if again else f"is not started again, {self.count - len(self._gone)} are left"
        self._say(f"{error}; it had {open_}, and {then}")
        self._post(self._end_open, copy, error)

    def _post(self, call: Callable[..., None], *given: Any) -> None:
        """Have the event loop make a call; without one nobody has asked for anything."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *given)

    def _end_open(self, copy: _Copy, error: TersorError) -> None:
        for opened in copy.open.values():
            opened.box.put(error)
        copy.open.clear()
        copy.load = 0

    def _deliver(self, copy: _Copy, told: list[tuple[str, News | TersorError]]) -> None:
        for name, news in told:
            opened = copy.open.get(name)
            if opened is None:  # its reader has left
                continue
            if isinstance(news, TersorError):
                opened.box.put(news)
                continue
            copy.load -= opened.unread
            opened.unread = 0
            grow(opened.output, news)
            opened.box.put(opened.output if opened.output.finished else opened.output.copied())


def _give_up(copy: _Copy) -> None:
    """Let nobody wait for grammars that a lost copy compiles: others do, and what cannot be is refused by them."""
    for number in list(copy.checks):
        found = copy.checks.pop(number, None)
        if found is not None:
            _answer(found, None)


def _answer(found: Future[None], error: TersorError | None) -> None:
    found.set_result(None) if error is None else found.set_exception(error)
