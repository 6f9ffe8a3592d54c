"""How do several engines of one machine answer one batch? A process each, fed whole prefix groups (`dispatch`)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from tersor.engine.batch_items import BatchEngine, Item
from tersor.engine.children import RESTARTS, Children, leave_signals
from tersor.engine.dispatch import Done, Event, Lost, run_over
from tersor.engine.outputs import Answer
from tersor.errors import InputError, TersorError

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
        self._stop = multiprocessing.get_context("spawn").Event()
        self._busy: set[int] = set()  # workers that have not ended what they began
        self._children = Children(_serve, (make, self._stop), restarts=restarts, parents=parents)
        for worker in range(count):
            self._children.start(worker)

    def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
        """Yield the outputs of all items, in any order.

        Raises:
            InputError: an earlier run was not read to its end, whose answers would be taken for those of this one.
            TersorError: an engine cannot be made, or no process is left.
        """
        if self._busy:
            raise InputError("an earlier run of these engines was not read to its end: make others")
        self._stop.clear()
        return run_over(self, items, stopping)

    def begin(self, worker: int, items: list[Item]) -> None:
        """Send a worker what it is to answer; one that is gone is noticed by `wait`."""
        self._busy.add(worker)
        try:
            self._children.links[worker].send(items)
        except OSError:
            return

    def wait(self, seconds: float) -> list[tuple[int, Event]]:
        """Return what workers sent, and which ended."""
        names = {link: worker for worker, link in self._children.links.items()}
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
            if isinstance(event, Done | Lost):
                self._busy.discard(worker)
            events.append((worker, event))
        return events

    def stop(self) -> None:
        """Have all processes begin no further item."""
        self._stop.set()

    def close(self) -> None:
        """End all processes; idempotent."""
        self._children.close()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ended(self, worker: int, reason: str) -> Lost:
        line = f"worker {worker}: {reason}{self._children.lost(worker)}"
        return Lost(line, final=not self._children.again(worker))


def _serve(link: Connection, worker: int, make: MakeEngine, stop: Any) -> None:
    """Answer what is sent until the other end is closed: outputs, then `Done`, or one line of what went wrong."""
    leave_signals()  # the first process drains
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
