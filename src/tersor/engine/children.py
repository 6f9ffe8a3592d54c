"""Processes of this machine that have an engine each: started, missed, started again, and ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

RESTARTS = 3
"""How often a process is started again."""

_GRACE = 5.0
"""Seconds that a process has to end before it is made to."""


class Children:
    """Processes by number, each with a link to it. To be closed.

    Attributes:
        links: number of a process -> our end of its link.
    """

    def __init__(
        self, work: Callable[..., None], arguments: tuple[Any, ...], *, restarts: int = RESTARTS, parents: bool = False
    ) -> None:
        """Begin with no process.

        Args:
            work: what each does, called as `work(link, number, *arguments)`; it is to end when its link does.
            arguments: for all of them, to be pickled.
            restarts: how often each is started again after it was lost.
            parents: whether they start processes of their own, which end with them.
        """
        self._work, self._arguments, self._most, self._parents = work, arguments, restarts, parents
        self._context: Any = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
        self._restarts: dict[int, int] = {}
        self.links: dict[int, Connection] = {}
        self._children: dict[int, BaseProcess] = {}

    def start(self, number: int) -> Connection:
        """Start a process and return the link to it."""
        ours, theirs = self._context.Pipe()
        arguments = (theirs, number, *self._arguments)
        child = self._context.Process(target=self._work, args=arguments, daemon=not self._parents)
        child.start()
        theirs.close()
        self.links[number], self._children[number] = ours, child
        return ours

    def lost(self, number: int) -> str:
        """Let go of a process whose link has ended, and return by what signal it did: `" by SIGKILL"`, or nothing."""
        child = self._children.pop(number)
        self.links.pop(number).close()
        _join(child, _GRACE)
        code = child.exitcode or 0
        return f" by {signal.Signals(-code).name}" if code < 0 else ""

    def again(self, number: int) -> bool:
        """Start a process once more that was lost, unless that was done as often as it may be; return whether."""
        tried = self._restarts.get(number, 0)
        if tried >= self._most:
            return False
        self._restarts[number] = tried + 1
        self.start(number)
        return True

    def wait(self, seconds: float) -> None:
        """Wait until all have ended, who were told to; those that have not in time are made to."""
        for child in list(self._children.values()):
            _join(child, seconds)

    def close(self) -> None:
        """End all processes; idempotent."""
        for link in self.links.values():
            link.close()
        for child in self._children.values():
            child.terminate()
            _join(child, _GRACE)
        self.links.clear()
        self._children.clear()


def leave_signals() -> None:
    """Ignore, in a process that another one has started, what may be sent to all of a group: that one ends this."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)


def end_with(link: Connection, status: int) -> None:
    """End this process, with a status, when the one that started it does."""
    try:
        link.recv()
    except (EOFError, OSError):
        os._exit(status)


def _join(child: BaseProcess, seconds: float) -> None:
    child.join(timeout=seconds)
    if child.is_alive():
        child.kill()
        child.join()
