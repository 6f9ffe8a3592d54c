"""Copies from the host to a device, in order, beside what is computed there; on a CPU each is done at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Link:
    """A stream of copies.

    Attributes:
        device: that they go to, a GPU with its number: another thread has another current one.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._stream = self._barrier = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._barrier = torch.zeros(1, dtype=torch.int32, device=device)

    def now(self) -> torch.cuda.Event | None:
        """Return an event that comes when all has run that was launched on the current stream; none on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let what is launched from now on, on the current stream, run only when an event has come.

        A kernel that is launched while the one ahead of it still runs reads its weights early. So a small one that is
        not goes ahead of it, and waits for both.
        """
        if event is not None and self._barrier is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
            self._barrier.add_(1)

    def after(self, event: torch.cuda.Event | None) -> None:
        """Let copies from now on run only when an event has come."""
        if event is not None and self._stream is not None:
            self._stream.wait_event(event)

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy bytes of pinned memory to the device."""
        if self._stream is None:
            into.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)

    def fills(self, slots: Sequence[torch.Tensor]) -> None:
        """Keep memory that copies go to until the last has come, even when nobody has it any more."""
        if self._stream is not None:
            for slot in slots:
                slot.record_stream(self._stream)

    def finish(self) -> None:
        """Wait on the host until the copies so far are done."""
        if self._stream is not None:
            self._stream.synchronize()

    def mark(self) -> torch.cuda.Event | None:
        """Return an event that comes when the copies so far are done; none on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event
