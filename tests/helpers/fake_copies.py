"""A machine with two queues, of products and of copies, which run when it pleases: what a streamer asks of it is held.

Queue "compute" has reads of slots, queue "copy" has writes of them, each queue in its order; a wait holds its queue
until a mark has come. A read takes time: it begins and ends as steps of their own, and so does a write.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

COMPUTE, COPY = "compute", "copy"
ANY = -1
"""What is read where any image will do."""


@dataclass(eq=False)
class Mark:
    """What comes when its place in a queue is reached."""

    come: bool = False
    captured: bool = False


@dataclass
class Machine:
    """The machine, which is what copies images for a streamer.

    Attributes:
        slots: what each holds: an image, or `None` while it is written.
        read: images in the order in which reads ended, each with what its slot held.
        copied: images in the order of their copies.
        graph: what is captured, while something is.
    """

    count: int
    chance: random.Random
    slots: list[int | None] = field(default_factory=list)
    read: list[tuple[int, int | None]] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    graph: list[tuple[str, tuple[Any, ...]]] | None = None
    queues: dict[str, deque[tuple[Any, ...]]] = field(default_factory=lambda: {COMPUTE: deque(), COPY: deque()})
    reading: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.slots = [None] * self.count

    def _put(self, queue: str, *operation: Any) -> None:
        if self.graph is not None:
            self.graph.append((queue, operation))
        else:
            self.queues[queue].append(operation)

    def load(self, image: int, slot: int) -> Mark:
        after, full = self.now(), Mark(captured=self.graph is not None)
        self._put(COPY, "wait", after)
        self._put(COPY, "begin", slot)
        self._put(COPY, "end", slot, image)
        self._put(COPY, "mark", full)
        return full

    def wait(self, mark: Mark) -> None:
        assert mark.captured == (self.graph is not None), "a graph waits for its own marks alone, and nobody else does"
        self._put(COMPUTE, "wait", mark)

    def now(self) -> Mark:
        mark = Mark(captured=self.graph is not None)
        self._put(COMPUTE, "mark", mark)
        return mark

    def launch(self, image: int, any_will_do: bool = False) -> None:
        """Launch a read of an image's slot, which may be whole and of another image where `any_will_do`."""
        wanted = ANY if any_will_do else image
        self._put(COMPUTE, "read", image % self.count, wanted)
        self._put(COMPUTE, "done", image % self.count, wanted)

    def replay(self, graph: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """Launch a graph: it begins when what was launched ahead has run, and what is behind waits for all of it."""
        own: dict[int, Mark] = {}
        begins, ends = Mark(), Mark()
        self._put(COMPUTE, "mark", begins)
        self._put(COPY, "wait", begins)
        for queue, operation in graph:
            marks = [own.setdefault(id(part), Mark()) if isinstance(part, Mark) else part for part in operation]
            self._put(queue, *marks)
        self._put(COPY, "mark", ends)
        self._put(COMPUTE, "wait", ends)

    def run(self, steps: int | None = None) -> None:
        """Run so many operations that may run, chosen at random; all unless given."""
        while steps is None or steps > 0:
            ready = [name for name, queue in self.queues.items() if queue and self._may(queue[0])]
            if not ready:
                assert steps is not None or not any(self.queues.values()), "nothing may run: a deadlock"
                return
            self._do(self.queues[self.chance.choice(ready)].popleft())
            steps = None if steps is None else steps - 1

    @staticmethod
    def _may(operation: tuple[Any, ...]) -> bool:
        return operation[0] != "wait" or bool(operation[1].come)

    def _do(self, operation: tuple[Any, ...]) -> None:
        kind, *rest = operation
        if kind == "mark":
            rest[0].come = True
        elif kind == "read":
            self.reading.add(rest[0])
        elif kind == "done":
            self.reading.remove(rest[0])
            self.read.append((rest[1], self.slots[rest[0]]))
        elif kind == "begin":
            assert rest[0] not in self.reading, f"slot {rest[0]} is written while it is read"
            self.slots[rest[0]] = None
        elif kind == "end":
            assert rest[0] not in self.reading, f"slot {rest[0]} is written while it is read"
            self.slots[rest[0]] = rest[1]
            self.copied.append(rest[1])
