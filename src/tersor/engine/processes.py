"""How do several engines of one machine answer one batch? A process each, fed whole prefix groups (`dispatch`)."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tersor.engine.batch_items import BatchEngine, Item
from tersor.engine.dispatch import Done, Event, Lost, run_over
from tersor.engine.outputs import Answer
from tersor.errors import InputError, TersorError

RESTARTS = 3
"""How often the process of a worker is started again."""

MakeEngine = Callable[[int], BatchEngine]
"""Makes the engine of a worker by its number; a function of a module, since it is called in another process."""


class Processes:
    """Engines in processes of their own; a `BatchEngine` itself. To be closed, or used as a context."""

    def __init__(self, make: MakeEngine, count: int, *, restarts: int = RESTARTS, parents: bool = False) -> None:
        """Start the processes; their engines are made when they are there.

        Args:
            make: makes the engine of each.
            count: how many.
            restarts: how often each is started again after it was lost.
            parents: whether an engine starts processes of its own; those end with it.
        """
        if count < 1:
            raise InputError(f"processes of a batch are {count}: they must be at least 1")
        self.count = count
        self._make, self._restarts, self._parents = make, [restarts] * count, parents
        self._context: Any = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
        self._stop = self._context.Event()
        self._links: dict[int, Connection] = {}
        self._children: dict[int, BaseProcess] = {}
        for worker in range(count):
            self._start(worker)

    def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
        """Yield the outputs of all items, in any order.

        Raises:
            TersorError: an engine cannot be made, or no process is left.
        """
        self._stop.clear()
        return run_over(self, items, stopping)

    def begin(self, worker: int, items: list[Item]) -> None:
        """Send a worker what it is to answer; one that is gone is noticed by `wait`."""
        try:
            self._links[worker].send(items)
        except OSError:
            return

    def wait(self, seconds: float) -> list[tuple[int, Event]]:
        """Return what workers sent, and which ended."""
        names = {link: worker for worker, link in self._links.items()}
        events: list[tuple[int, Event]] = []
        for link in wait(list(names), seconds):
            assert isinstance(link, Connection)
            worker = names[link]
            try:
                event = link.recv()
            except (EOFError, OSError):
                event = self._ended(worker, "its process ended")
            if isinstance(event, Exception):
                raise TersorError(f"the engine of worker {worker} cannot be made: {event}")
            if isinstance(event, str):
                event = self._ended(worker, event)
            events.append((worker, event))
        return events

    def stop(self) -> None:
        """Have all processes begin no further item."""
        self._stop.set()

    def close(self) -> None:
        """End all processes; idempotent."""
        for link in self._links.values():
            link.close()
        for child in self._children.values():
            child.terminate()
            _join(child)
        self._links.clear()
        self._children.clear()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, worker: int) -> None:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._make, worker, self._stop)
        child = self._context.Process(target=_serve, args=arguments, daemon=not self._parents)
        child.start()
        theirs.close()
        self._links[worker], self._children[worker] = ours, child

    def _ended(self, worker: int, reason: str) -> Lost:
        child = self._children.pop(worker)
        self._links.pop(worker).close()
        _join(child)
        code = child.exitcode or 0
        how = f" by {signal.Signals(-code).name}" if code < 0 else ""
        if self._restarts[worker] == 0:
            return Lost(f"worker {worker}: {reason}{how}", final=True)
        self._restarts[worker] -= 1
        self._start(worker)
        return Lost(f"worker {worker}: {reason}{how}")


def _join(child: BaseProcess) -> None:
    child.join(timeout=5)
    if child.is_alive():
        child.kill()
        child.join()


def _serve(link: Connection, make: MakeEngine, worker: int, stop: Any) -> None:
    """Answer what is sent until the other end is closed: outputs, then `Done`, or one line of what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process drains
    try:
        try:
            engine = make(worker)
        except Exception as error:
            link.send(TersorError(_line(error)))
            return
        while True:
            items = link.recv()
            try:
                for answer in engine.run(items, stop.is_set):
                    link.send(answer)
            except OSError:
                raise
            except Exception as error:
                link.send(_line(error))
                return
            link.send(Done())
    except (EOFError, OSError):
        return


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
