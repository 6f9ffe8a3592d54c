"""How do stored bytes come to the device? In chunks, by a few threads, through memory that the device copies from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

import torch

from tersor.checkpoint.names import TORCH_DTYPES
from tersor.checkpoint.source import StoredTensor
from tersor.layouts.shard import Part, Span
from tersor.ops import current

_Made = TypeVar("_Made")

CHUNK = 16 << 20
"""Bytes that a thread reads and copies at once."""
THREADS = 4
"""A thread reads from the page cache at a few GB/s, and a disk serves several better than one."""


class Reading:
    """Reads tensors to a device; threads and their memory last as long as it is open.

    Attributes:
        device: where tensors are read to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        begin = current.same_stream(device)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read", initializer=begin)
        self._callers = ThreadPoolExecutor(THREADS, thread_name_prefix="read-each", initializer=begin)
        self._own = threading.local()

    def __enter__(self) -> Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._callers.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)

    def read(self, tensor: StoredTensor, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return a tensor, or its rows `first` to `last` (exclusive) along the first axis, on the device.

        Raises:
            CheckpointError: the disk does not give them.
        """
        spec, shape, start = tensor.spec, tensor.spec.shape, 0
        if rows is not None:
            start = rows[0] * (spec.nbytes // shape[0])
            shape = (rows[1] - rows[0], *shape[1:])
        result = torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype], device=self.device)
        if not result.numel():
            return result
        flat = result.reshape(-1).view(torch.uint8)

        def part(first: int) -> None:
            last = min(first + CHUNK, len(flat))
            host = flat[first:last] if self.device.type == "cpu" else self._buffer()[: last - first]
            tensor.file.read_into(spec, start + first, host.numpy().data)
            if self.device.type != "cpu":
                flat[first:last].copy_(host)  # returns when it is there, so the buffer is free

        if len(flat) <= CHUNK:
            part(0)
        else:
            list(self._pool.map(part, range(0, len(flat), CHUNK)))
        return result

    def read_part(self, tensor: StoredTensor, part: Part, expert: int | None = None) -> torch.Tensor:
        """Return a part of a tensor of one or two axes, on the device; no other bytes are read.

        Args:
            tensor: the whole one.
            part: of it, or of one expert in it.
            expert: its place along the first axis, where a tensor holds the matrices of all.

        Raises:
            CheckpointError: the disk does not give it.
        """
        spec = tensor.spec
        if expert is not None:
            offset = spec.offset + expert * (spec.nbytes // spec.shape[0])
            spec = replace(spec, shape=spec.shape[1:], offset=offset)
        result = torch.empty(part.shape(spec.shape), dtype=TORCH_DTYPES[spec.dtype], device=self.device)
        if not result.numel():
            return result
        most, at = max(1, CHUNK // (result.nbytes // len(result))), 0
        pieces: list[tuple[Span, int]] = []  # rows of the whole, and where in the result they begin
        for start, end in part.rows or ((0, spec.shape[0]),):
            for first in range(start, end, most):
                rows = (first, min(first + most, end))
                pieces.append((rows, at))
                at += rows[1] - first

        def read(piece: tuple[Span, int]) -> None:
            rows, at = piece
            found = tensor.file.read_part(spec, [rows], part.columns)
            result[at : at + len(found)].copy_(found)

        if len(pieces) == 1:
            read(pieces[0])
        else:
            list(self._pool.map(read, pieces))
        return result

    def each(self, make: Callable[[int], _Made], indices: Sequence[int]) -> list[_Made]:
        """Return what `make` returns for each index, called by a few threads: for tensors of less than a chunk each.

        Raises:
            CheckpointError: the disk does not give them.
        """
        return list(self._callers.map(make, indices))

    def _buffer(self) -> torch.Tensor:
        """Return this thread's memory for a chunk, pinned for a GPU."""
        found: torch.Tensor | None = getattr(self._own, "buffer", None)
        if found is None:
            found = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            self._own.buffer = found
        return found
