"""Images in pinned memory of the host."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from tersor.offload import pinned
from tersor.offload.image import Image
from tersor.offload.link import Link


class HostStore:
    """Images in memory of the host, and who copies them (`streamer.Copies`).

    Attributes:
        where: of the images, for a line.
        graphs: whether a step that copies them can be a CUDA graph: it is all copies and events.
    """

    where = "pinned host memory"
    graphs = True

    def __init__(self, device: torch.device) -> None:
        self._link = Link(device)
        self._images: list[torch.Tensor] = []
        self._slots: Sequence[torch.Tensor] = ()

    @staticmethod
    def check_room(nbytes: int) -> None:
        """Hold that so many bytes can be had, before any is read.

        Raises:
            TersorError: they cannot.
        """
        free = pinned.available()
        if nbytes > free:
            raise pinned.too_little(nbytes, free)

    def add(self, image: Image, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the tensors of the next image from the device.

        Raises:
            TersorError: there is no memory for it.
        """
        memory = pinned.allocate(image.nbytes, self._link.device)
        image.write(memory, tensors)
        self._images.append(memory)

    def serve(self, slots: Sequence[torch.Tensor]) -> None:
        """Be ready to fill slots, uint8 on the device, as large as the largest image each."""
        self._slots = slots
        self._link.fills(slots)

    def bandwidth(self, repeats: int = 16) -> float:
        """Return the bytes per second of plain copies of other pinned memory, as large as the largest image."""
        self._link.finish()
        nbytes, device = max(len(memory) for memory in self._images), self._link.device
        memory, link = pinned.allocate(nbytes, device), Link(device)
        into = torch.empty(nbytes, dtype=torch.uint8, device=device)
        link.copy(into, memory)
        link.finish()
        started = time.perf_counter()
        for _ in range(repeats):
            link.copy(into, memory)
        link.finish()
        return repeats * nbytes / (time.perf_counter() - started)

    def load(self, image: int, slot: int) -> torch.cuda.Event | None:
        """Begin to fill a slot; see `Copies`."""
        memory, link = self._images[image], self._link
        link.after(link.now())
        link.copy(self._slots[slot][: len(memory)], memory)
        return link.mark()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Let what is launched from now on wait for a copy."""
        self._link.wait(mark)

    def now(self) -> torch.cuda.Event | None:
        """Return an event that comes when all has run that was launched so far."""
        return self._link.now()
