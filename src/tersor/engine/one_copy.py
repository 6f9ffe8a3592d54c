"""One of several copies of a model, in a process of its own: it hears of requests by a link, and tells what is new.

The words that pass are here. What is asked is heard by a thread, so that a process ends with the one that started it
whatever it does meanwhile; steps run in the main thread (`loop`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

from tersor.engine.children import leave_signals
from tersor.engine.core import Core
from tersor.engine.garbage import left_alone
from tersor.engine.loop import Loop, Told
from tersor.engine.news import News, Teller
from tersor.engine.params import SamplingParams
from tersor.engine.protocol import ModelInfo
from tersor.engine.stats import EngineStats
from tersor.errors import InputError, TersorError, UnsupportedError

_ALONE = 3
"""Exit status of a process that nobody asks any more."""


class Loaded(Protocol):
    """A model that is loaded: `tersor.LLM`."""

    core: Core
    info: ModelInfo

    def close(self) -> None:
        """Let go of it."""


Load = Callable[[int], Loaded]
"""Loads the model of a copy by its number; to be pickled."""


class Ask(NamedTuple):
    """A request, as `AsyncEngine.generate` takes it."""

    request_id: str
    prompt: list[int]
    params: SamplingParams | None
    salt: str | None


class Abort(NamedTuple):
    """A request is to end."""

    request_id: str


class Check(NamedTuple):
    """A grammar is to be compiled; the number is of this question."""

    number: int
    grammar: Mapping[str, Any]


class Checked(NamedTuple):
    """A grammar was compiled, or why it was not."""

    number: int
    error: TersorError | None


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded.

    Attributes:
        name, context, vocabulary: as `ModelInfo` has them.
        page: tokens of a page of keys and values.
        shares: whether prompts share pages.
        stats: of the engine, which has done nothing.
    """

    name: str
    context: int
    vocabulary: int
    page: int
    shares: bool
    stats: EngineStats


class Step(NamedTuple):
    """What a step changed: requests, or why one of them is refused, and how the engine stands."""

    news: list[tuple[str, News | TersorError]]
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class Failed:
    """Why the process ends: its model cannot be loaded, or a step failed.

    Attributes:
        line: what was raised.
        usage: whether that was an `InputError`.
    """

    line: str
    usage: bool = False


Asked = Ask | Abort | Check | None
"""What a copy hears; `None` is to end."""
Word = Ready | Step | Checked | Failed
"""What a copy says."""


def work(link: Connection, number: int, load: Load) -> None:
    """Be a copy until it is told to end, or until the process that started it does.

    Args:
        link: to that process.
        number: of the copy.
        load: loads the model.
    """
    leave_signals()  # the first process lets open requests end
    copy = _Copy(link)
    threading.Thread(target=copy.listen, name="tersor copy", daemon=True).start()
    try:
        with closing(load(number)) as loaded:
            copy.run(loaded)
    except Exception as error:
        copy.say(Failed(_line(error), isinstance(error, InputError)))


class _Copy:
    def __init__(self, link: Connection) -> None:
        self._link, self._lock, self._loop = link, threading.Lock(), Loop()
        self._core: Core | None = None
        self._teller, self._stats = Teller(), EngineStats()

    def listen(self) -> None:
        """Pass on what is asked, for as long as somebody may ask."""
        try:
            while True:
                asked: Asked = self._link.recv()
                if isinstance(asked, Ask):
                    self._loop.add(*asked)
                elif isinstance(asked, Abort):
                    self._loop.abort(asked.request_id)
                elif isinstance(asked, Check):
                    threading.Thread(target=self._check, args=asked, daemon=True).start()
                elif self._core is None:
                    return
                else:
                    self._loop.end()
        except (EOFError, OSError):
            return
        finally:
            os._exit(_ALONE)

    def run(self, loaded: Loaded) -> None:
        """Run steps until told to end, or until one fails."""
        core, info = loaded.core, loaded.info
        self._core, self._stats = core, core.stats()
        limits = core.scheduler.limits
        self.say(Ready(info.name, info.context, info.vocabulary, limits.page_size, limits.share_prefixes, self._stats))
        with left_alone():
            self._loop.run(core, self._tell)

    def say(self, word: Word) -> None:
        """Send a word; whoever does not hear it any more has ended, as this process is about to."""
        with self._lock:
            try:
                self._link.send(word)
            except OSError:
                return

    def _tell(self, told: Told) -> None:
        assert self._core is not None
        stats = self._core.stats()
        if not told and stats == self._stats:
            return
        self._stats = stats
        news = [(name, _plain(one) if isinstance(one, Exception) else self._teller.news(one)) for name, one in told]
        self.say(Step(news, stats))

    def _check(self, number: int, grammar: Mapping[str, Any]) -> None:
        """Compile a grammar where it will be used, in a thread that takes as long as that takes."""
        error: TersorError | None = None
        try:
            if self._core is not None:
                self._core.check_grammar(grammar)
        except Exception as found:
            error = _plain(found)
        self.say(Checked(number, error))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _plain(error: Exception) -> TersorError:
    """Return an error that can be pickled, whatever its own class wants, and means the same to who asked."""
    kind = next((one for one in (InputError, UnsupportedError) if isinstance(error, one)), TersorError)
    return kind(_line(error))
