"""A CUDA graph is captured on its own GPU, undisturbed; a capture that fails leaves torch as it was.

While a graph is captured CUDA refuses some calls and takes the capture for broken: in the thread that captures, all
that waits or lets go of memory; in any thread, to wait for the whole device. What is let go of elsewhere comes at any
time, so what that calls for memory goes through `outside`. Python's collector rests meanwhile: what it finds may be
torch's own, such as the graph of an error that was handled, and torch lets go of it at once.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


class _Turns:
    """Captures of this process, one after the other, and what waits until there is none."""

    def __init__(self) -> None:
        self._one = threading.RLock()
        self._state = threading.RLock()  # the collector may come to a thread that has it
        self._open = False
        self._waiting: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Be the one capture; behind it, do what had to wait."""
        with self._one:  # to begin one waits for the device
            with self._state:
                self._open = True
            collects = gc.isenabled()
            gc.disable()
            try:
                yield
            finally:
                if collects:
                    gc.enable()
                with self._state:
                    self._open, waiting = False, self._waiting
                    self._waiting = []
                for work in waiting:
                    self.outside(work)

    def outside(self, work: Callable[[], None]) -> None:
        with self._state:
            if self._open:
                self._waiting.append(work)
            else:
                work()


_turns = _Turns()


def outside(work: Callable[[], None]) -> None:
    """Do what no thread may do while a graph is captured: now, or as soon as none is."""
    _turns.outside(work)


@contextlib.contextmanager
def beside(side: torch.cuda.Stream) -> Iterator[None]:
    """Launch in the context on another stream, between what was launched before it and what is launched behind it.

    So it is where the context fails, too: memory that is let go of then may still be read there.
    """
    own = torch.cuda.current_stream(side.device)
    side.wait_stream(own)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        own.wait_stream(side)


@contextlib.contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, device: torch.device, *, generators: Sequence[torch.Generator] = (), **options: Any
) -> Iterator[None]:
    """Capture what runs in the context into a graph; the device is the current one there.

    What other threads call meanwhile does not matter (`thread_local`, as torch has it): that of NCCL asks for events,
    one that reads files copies, and another model may take memory. Unless told, torch captures the stream of the device
    that was current at the first capture of all: of a model on another one that holds nothing.

    To torch its random numbers belong to a capture until one ends well: behind a failed one `torch.randn` would raise.
    Nor does torch go back to the stream that was current: what follows would be launched on that of captures.

    Args:
        graph: which is captured.
        device: a GPU; without a number the current one.
        generators: that draw in the context, beside torch's own.
        options: of `torch.cuda.graph`.

    Raises:
        RuntimeError: what ran is forbidden in a capture, or memory ran out.
    """
    with _turns.taken(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()):
        stream = _stream(torch.cuda.current_device())
        for one in generators:
            graph.register_generator_state(one)
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local", **options):
                yield
        except RuntimeError:
            with contextlib.suppress(RuntimeError):
                other = torch.cuda.CUDAGraph()
                for one in generators:
                    other.register_generator_state(one)
                with torch.cuda.graph(other, stream=stream, capture_error_mode="relaxed"):
                    torch.zeros(1, device="cuda")
            raise


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    """Return the stream of a device on which graphs are captured."""
    return torch.cuda.Stream(index)
