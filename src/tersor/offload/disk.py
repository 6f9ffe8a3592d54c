"""Images in a file, read ahead by several threads through a ring of pinned buffers.

The file holds what slots get, byte for byte: kernels' own layouts, so that nothing is rearranged on the way. It is
written when the model is loaded and has no name from then on: it is gone with the process, however that ends. Where the
file system can, it is read past the page cache (O_DIRECT), which would have a copy of its own and be slower.
"""

from __future__ import annotations

import errno
import os
import queue
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tersor.errors import OutputError, TersorError
from tersor.offload import pinned
from tersor.offload.image import BLOCK, Image
from tersor.offload.link import Link
from tersor.ops import current

CHUNK = 16 << 20
"""Bytes that a thread reads at once."""
BUFFERS = 24
"""Chunks of the ring: those read ahead, and those on their way to the device."""
THREADS = 8
"""A disk is fast when it is asked for much at once."""
_ON_THEIR_WAY = 2
"""Chunks that are copied to the device while the next is waited for."""
_LOOK = 0.5
"""Seconds of waiting after which it is asked whether anybody is there who ends it."""


@dataclass(slots=True)
class Ticket:
    """A slot that is being filled.

    Attributes:
        offset, nbytes: of the image in the file.
        into: the slot, uint8 [nbytes].
        after: what has to run before anything is written there.
        issued: all copies are under way, or it failed.
        event: comes when they are done.
        error: why it failed.
    """

    offset: int
    nbytes: int
    into: torch.Tensor
    after: torch.cuda.Event | None
    issued: threading.Event = field(default_factory=threading.Event)
    event: torch.cuda.Event | None = None
    error: BaseException | None = None


class DiskStore:
    """Images in a file of a directory, and who copies them (`streamer.Copies`).

    Attributes:
        where: of the images, for a line.
        graphs: whether a step that copies them can be a CUDA graph: the host has to read them meanwhile.
    """

    graphs = False

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        *,
        chunk: int = CHUNK,
        buffers: int = BUFFERS,
        threads: int = THREADS,
    ) -> None:
        """Make the file.

        Args:
            directory: where it is; made if it is not there.
            device: of the slots.
            chunk: bytes of a buffer, a multiple of `BLOCK`.
            buffers, threads: of the ring.

        Raises:
            OutputError: it cannot be made there.
            TersorError: no memory for the ring.
        """
        assert chunk % BLOCK == 0
        self._directory, self._chunk, self._link = directory, chunk, Link(device)
        self._file, self.direct = _open(directory)
        self.where = f"a file in {directory}" + ("" if self.direct else ", through the page cache")
        self._feeds: list[_Feed] = []  # one, once images are served
        weakref.finalize(self, _close, self._file, self._feeds)
        ring = pinned.allocate(chunk * buffers, self._link.device)
        self._ring = [ring[first : first + chunk] for first in range(0, len(ring), chunk)]
        self._memory, self._threads, self._end = ring, threads, 0  # the whole is pinned as long as it is held
        self._images: list[tuple[int, int]] = []
        self._slots: Sequence[torch.Tensor] = ()

    @staticmethod
    def check_room(directory: Path, nbytes: int) -> None:
        """Hold that a directory's disk has so many bytes, before any is written.

        Raises:
            OutputError: it has not.
        """
        there = directory
        while not there.exists() and there != there.parent:
            there = there.parent
        state = os.statvfs(there)
        free = state.f_bavail * state.f_frsize
        if nbytes > free:
            raise OutputError(
                f"offload: {nbytes / 1e9:.1f} GB are to be written to {directory}, and its disk has {free / 1e9:.1f} "
                "GB left: name another directory (offload_directory), or keep more layers on the GPU (resident_layers)"
            )

    def add(self, image: Image, tensors: Sequence[torch.Tensor]) -> None:
        """Write the tensors of the next image.

        Raises:
            OutputError: the disk is full, or fails.
        """
        whole = torch.zeros(image.nbytes, dtype=torch.uint8, device=self._link.device)
        image.write(whole, tensors)
        first, free = self._end, queue.SimpleQueue[torch.Tensor]()
        for buffer in self._ring:
            free.put(buffer)

        def write(start: int) -> None:
            size = min(self._chunk, image.nbytes - start)
            buffer = free.get()
            try:
                buffer[:size].copy_(whole[start : start + size])
                _write(self._file, buffer[:size], first + start)
            finally:
                free.put(buffer)

        try:
            begin = current.same_stream(self._link.device)
            with ThreadPoolExecutor(self._threads, thread_name_prefix="offload-write", initializer=begin) as pool:
                list(pool.map(write, range(0, image.nbytes, self._chunk)))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full" if full else f"cannot be written: {error.strerror}"
            raise OutputError(f"offload: {self._directory}: {why} behind {first / 1e9:.1f} GB of weights") from None
        self._images.append((first, image.nbytes))
        self._end += image.nbytes

    def serve(self, slots: Sequence[torch.Tensor]) -> None:
        """Be ready to fill slots, uint8 on the device, as large as the largest image each; nothing is added then."""
        self._slots = slots
        self._link.fills(slots)
        self._feeds.append(_Feed(self._file, self._memory, self._ring, self._link, self._threads))

    def bandwidth(self) -> float:
        """Return the bytes per second of plain reads of the whole file, by as many threads, which go nowhere.

        Raises:
            TersorError: the disk does not give it.
        """
        buffers = pinned.allocate(self._chunk * self._threads, torch.device("cpu"))
        free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for part in buffers.split(self._chunk):
            free.put(part)

        def read(start: int) -> None:
            buffer = free.get()
            try:
                _read(self._file, buffer[: self._end - start], start)
            finally:
                free.put(buffer)  # others wait for it

        started = time.perf_counter()
        try:
            with ThreadPoolExecutor(self._threads, thread_name_prefix="offload-time") as pool:
                list(pool.map(read, range(0, self._end, self._chunk)))
        except OSError as error:
            raise self._failed(error) from None
        return self._end / (time.perf_counter() - started)

    def load(self, image: int, slot: int) -> Ticket:
        """Begin to fill a slot; see `Copies`."""
        offset, nbytes = self._images[image]
        ticket = Ticket(offset, nbytes, self._slots[slot][:nbytes], self._link.now())
        self._feeds[0].tickets.put(ticket)
        return ticket

    def wait(self, mark: Ticket) -> None:
        """Wait until a slot's last chunk was read, and let what is launched from now on wait for its copy.

        Raises:
            TersorError: the disk does not give it, or who sends it on has failed.
        """
        while not mark.issued.wait(_LOOK):
            if not self._feeds[0].sends() and not mark.issued.is_set():
                raise self._failed(self._feeds[0].error)
        if mark.error is not None:
            raise self._failed(mark.error)
        self._link.wait(mark.event)

    def now(self) -> Ticket:
        """Return a ticket that is done when all has run that was launched so far."""
        ticket = Ticket(0, 0, torch.empty(0, dtype=torch.uint8), None, event=self._link.now())
        ticket.issued.set()
        return ticket

    def _failed(self, error: BaseException | None) -> TersorError:
        """Return the error of who waits: the first line of another one, which is its cause."""
        why = "nobody reads them any more" if error is None else str(error).partition("\n")[0] or type(error).__name__
        failed = TersorError(f"offload: {self._directory}: weights cannot be read: {why}")
        failed.__cause__ = error
        return failed


class _Feed:
    """Two threads: one has chunks read ahead into what is free of the ring, the other sends them on, in order.

    Where one ends, the other does.

    Attributes:
        tickets: of slots to be filled; `None` ends the threads behind those ahead of it.
        error: why a thread ended before it was to.
    """

    def __init__(self, file: int, memory: torch.Tensor, ring: Sequence[torch.Tensor], link: Link, threads: int) -> None:
        assert len(ring) > _ON_THEIR_WAY
        self._memory = memory  # of the ring, pinned as long as it is held
        self._own: set[int] = set()  # threads, by their numbers
        self.tickets: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self._file, self._link, self._count = file, link, threads
        self._chunk = len(ring[0])
        self._free: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        for buffer in ring:
            self._free.put(buffer)
        self._reads: queue.SimpleQueue[tuple[Ticket, int, torch.Tensor, Future[None]] | None] = queue.SimpleQueue()
        self._ahead = self._thread("offload-ahead", self._read_ahead, self._reads)
        self._sending = self._thread("offload-send", self._send, self._free)
        self._ahead.start()
        self._sending.start()

    def sends(self) -> bool:
        """Whether the thread is there that tickets wait for."""
        return self._sending.is_alive()

    def runs_here(self) -> bool:
        """Whether this thread is one of those that read or send."""
        return threading.get_ident() in self._own

    def stop(self) -> None:
        """End the threads, behind what was asked for; none of them may ask, since each waits for the others."""
        self.tickets.put(None)
        self._ahead.join()
        self._sending.join()

    def _enter(self) -> None:
        """Note that this thread is one of them."""
        self._own.add(threading.get_ident())

    def _thread(self, name: str, work: Callable[[], None], taken: queue.SimpleQueue[Any]) -> threading.Thread:
        """Return a thread that keeps why its work failed, and ends the other one, which takes from a queue."""

        def run() -> None:
            self._enter()
            try:
                work()
            except BaseException as error:
                self.error = self.error or error
            finally:
                taken.put(None)

        return threading.Thread(target=run, name=name, daemon=True)

    def _read_ahead(self) -> None:
        with ThreadPoolExecutor(self._count, thread_name_prefix="offload-read", initializer=self._enter) as pool:
            while (ticket := self.tickets.get()) is not None:
                for start in range(0, ticket.nbytes, self._chunk):
                    whole = self._free.get()
                    if whole is None:
                        return
                    buffer = whole[: ticket.nbytes - start]
                    read = pool.submit(_read, self._file, buffer, ticket.offset + start)
                    self._reads.put((ticket, start, buffer, read))

    def _send(self) -> None:
        if self._link.device.type == "cuda":
            torch.cuda.set_device(self._link.device)
        sent: deque[tuple[torch.cuda.Event | None, torch.Tensor]] = deque()
        while (chunk := self._reads.get()) is not None:
            ticket, start, buffer, read = chunk
            try:
                read.result()
                if not start:
                    self._link.after(ticket.after)
                self._link.copy(ticket.into[start : start + len(buffer)], buffer)
            except BaseException as error:
                ticket.error = ticket.error or error
            sent.append((self._link.mark(), buffer))
            if start + len(buffer) == ticket.nbytes:
                ticket.event = self._link.mark()
                ticket.issued.set()
            while len(sent) > _ON_THEIR_WAY:
                event, done = sent.popleft()
                if event is not None:
                    event.synchronize()
                self._free.put(_whole(done, self._chunk))


def _whole(buffer: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the buffer of the ring that a part of it begins."""
    return buffer if len(buffer) == chunk else buffer.as_strided((chunk,), (1,))


def _close(file: int, feeds: Sequence[_Feed]) -> None:
    """End who reads a file, and close it; where the collector has come to one of their threads, another one does."""
    if any(feed.runs_here() for feed in feeds):
        threading.Thread(target=_close, args=(file, feeds), name="offload-close", daemon=True).start()
        return
    for feed in feeds:
        feed.stop()
    os.close(file)


def _open(directory: Path) -> tuple[int, bool]:
    """Return a new file without a name, and whether it goes past the page cache."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(prefix="tersor-offload-", dir=directory)
    except OSError as error:
        raise OutputError(f"offload: no file can be made in {directory}: {error.strerror}") from None
    try:
        direct = os.open(name, os.O_RDWR | os.O_DIRECT)
    except (OSError, AttributeError):  # a file system, or a system, that has no such thing
        os.unlink(name)
        return file, False
    os.close(file)
    os.unlink(name)
    return direct, True


def _write(file: int, buffer: torch.Tensor, offset: int) -> None:
    data = buffer.numpy().data
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _read(file: int, buffer: torch.Tensor, offset: int) -> None:
    data = buffer.numpy().data
    while data:
        count = os.preadv(file, [data], offset)
        if not count:
            raise OSError("the file is shorter than it was written")
        data, offset = data[count:], offset + count
