"""Which image is copied when, and into which slot? All images take turns, in one order, step after step.

An image is the packed weights of a layer in one piece of bytes, a slot a buffer on the device. Image i is always read
in slot i % slots: kernels, and CUDA graphs of them, find its weights at one address. A slot is filled again as soon as
its image has been read, so that copies run ahead of reads by as many images as there are slots but one.

Between two steps slot 0 holds image 0, or is being filled with it, and the other slots are free, but for those that one
image has to itself: the copy for the next step runs beside the end of this one. So a step can be a graph, which begins
and ends in that state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

Mark = TypeVar("Mark")
"""What comes when a copy, or what was launched ahead of it, has run."""

SLOTS = 2
"""Two layers deep: one is read while the other is filled."""


class Copies(Protocol[Mark]):
    """Who copies images; calls come in the order in which steps are launched, and copies run in that order."""

    def load(self, image: int, slot: int) -> Mark:
        """Begin to fill a slot once all that has been launched so far has run; the mark comes when it is full."""
        ...

    def wait(self, mark: Mark) -> None:
        """Let what is launched from now on run only when a mark has come."""
        ...

    def now(self) -> Mark:
        """Return a mark that comes when all that has been launched so far has run."""
        ...


class Streamer(Generic[Mark]):
    """Plans copies while a step is launched: every read of an image stands between its `arrive` and its `leave`."""

    def __init__(self, images: int, slots: int, copies: Copies[Mark]) -> None:
        """Begin with slots that hold nothing.

        Args:
            images: read in this order in every step, at least one.
            slots: buffers, at least one.
            copies: who fills them.
        """
        assert images > 0 and slots > 0
        self.images, self.slots = images, slots
        self._copies = copies
        self._held: dict[int, tuple[int, Mark | None]] = {}  # slot -> image, and the mark of its copy
        self._rests = False

    def begin(self) -> None:
        """Begin a step: the first images are copied that are not there yet; what a step left that failed is undone."""
        if not self._rests:
            for image in range(min(self.slots, self.images)):
                self._hold(image)

    def arrive(self, image: int) -> None:
        """Let what is launched from now on find an image in its slot."""
        if self._rests:
            return
        mark = self._hold(image)
        if mark is not None:
            self._copies.wait(mark)

    def leave(self, image: int) -> None:
        """Give the slot of an image, which nothing reads any more in this step, to the next one."""
        following = image + self.slots
        if self._rests:
            return
        if following < self.images:
            self._hold(following)
        elif image % self.slots == 0:
            self._hold(0)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Launch in the context steps that read what slots hold, whichever images: only the first ones are copied."""
        for image in range(min(self.slots, self.images)):
            self.arrive(image)
        self._rests = True
        try:
            yield
        finally:
            self._rests = False

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        """Capture what a step launches in the context: nothing of it runs, and `replayed` is around what will.

        What was copied before is there when the captured step begins; what it copies it waits for at its end.
        """
        before = self._held
        self._held = {image: (image, None) for image in self._kept}
        try:
            yield
            for image in self._kept:
                self.arrive(image)
        finally:
            self._held = before

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Run a captured step in the context."""
        for image in self._kept:
            self.arrive(image)
        yield
        mark = self._copies.now()
        self._held = {image: (image, mark) for image in self._kept}

    @property
    def copied(self) -> list[int]:
        """Images that a step copies: those that share a slot, in order."""
        return [image for image in range(self.images) if image >= self.slots or image + self.slots < self.images]

    @property
    def _kept(self) -> list[int]:
        """Images that are in their slots between steps: the first one, and those that have a slot to themselves."""
        first = range(min(self.slots, self.images))
        return [image for image in first if not image or image + self.slots >= self.images]

    def _hold(self, image: int) -> Mark | None:
        """Have an image in its slot, and return the mark of its copy; `None` where that came long ago."""
        slot = image % self.slots
        held = self._held.get(slot)
        if held is None or held[0] != image:
            held = self._held[slot] = (image, self._copies.load(image, slot))
        return held[1]
