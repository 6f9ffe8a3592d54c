"""How are tensors read from a safetensors file? By `pread`, a block at a time: nothing is mapped or kept."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from tersor.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, TensorSpec, parse
from tersor.checkpoint.names import TORCH_DTYPES
from tersor.errors import CheckpointError

_LENGTH_BYTES = 8


class SafetensorsFile:
    """An open safetensors file. Reads are positioned, so several threads may read at once.

    Attributes:
        path: where the file is.
        tensors: the tensors in it by name, in the order of their bytes.
        metadata: the free text in the header.
        header_digest: SHA-256 of the header, which names every tensor and its place.
        nbytes: bytes of the whole file.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and check its header.

        Raises:
            CheckpointError: it cannot be opened, is truncated, or is not a safetensors file.
        """
        self.path = path
        try:
            # A pipe would keep us waiting for somebody who writes.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from None
        try:
            self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    def _read_header(self) -> None:
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{self.path} is no regular file: put the file itself there")
        self.nbytes = found.st_size
        start = self._read_bytes(0, min(_LENGTH_BYTES, self.nbytes))
        if start[:7] == b"version":
            raise CheckpointError(
                f"{self.path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
            )
        if len(start) < _LENGTH_BYTES:
            raise CheckpointError(
                f"{self.path} holds {self.nbytes} bytes, too few for a safetensors file: download it again"
            )
        length = int.from_bytes(start, "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path} is not a safetensors file: it claims a header of {length} bytes (2 to {MAX_HEADER_BYTES})"
            )
        if _LENGTH_BYTES + length > self.nbytes:
            raise CheckpointError(
                f"{self.path} is truncated inside its header ({self.nbytes} of at least {_LENGTH_BYTES + length} "
                "bytes): download it again"
            )
        raw = self._read_bytes(_LENGTH_BYTES, length)
        self._data_start = _LENGTH_BYTES + length
        self.header_digest = hashlib.sha256(raw).hexdigest()
        self.tensors, self.metadata = parse(raw, self.nbytes - self._data_start, str(self.path))

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, spec: TensorSpec, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a tensor from byte `start` of the tensor on.

        Raises:
            CheckpointError: the disk does not give them.
        """
        position = self._data_start + spec.offset + start
        while len(buffer):
            try:
                count = os.preadv(self._fd, [buffer], position)
            except OSError as error:
                raise CheckpointError(f"cannot read {spec.name!r} from {self.path}: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{self.path} ends inside tensor {spec.name!r}: it changed while it was read")
            buffer = buffer[count:]
            position += count

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Read a tensor, or rows `first` to `last` (exclusive) of its first axis, into memory of its own.

        Raises:
            CheckpointError: no such tensor, no torch dtype for it, or the disk does not give it.
        """
        spec = self.tensors.get(name)
        if spec is None:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}")
        dtype = TORCH_DTYPES.get(spec.dtype)
        if dtype is None:
            raise CheckpointError(f"{self.path}: torch has no dtype for {spec.dtype}, that of tensor {name!r}")
        shape, start = spec.shape, 0
        if rows is not None:
            row_bytes = spec.nbytes // spec.shape[0] if spec.shape[0] else 0
            shape, start = (rows[1] - rows[0], *spec.shape[1:]), rows[0] * row_bytes
        result = torch.empty(shape, dtype=dtype)
        if result.numel():
            flat = result.reshape(-1).view(torch.uint8)
            self.read_into(spec, start, flat.numpy().data)
        return result

    def read_columns(self, name: str, first: int, last: int) -> torch.Tensor:
        """Read columns `first` to `last` (exclusive) of a 2-D tensor, and no others, into memory of their own.

        Raises:
            CheckpointError: the disk does not give them.
        """
        return self.read_part(self.tensors[name], None, (first, last))

    def read_part(
        self, spec: TensorSpec, rows: Sequence[tuple[int, int]] | None, columns: tuple[int, int] | None
    ) -> torch.Tensor:
        """Read a part of a tensor of one or two axes, and no other bytes, into memory of its own.

        Args:
            spec: the tensor.
            rows: spans (first, last, exclusive) of the first axis, one behind the other; `None` is all.
            columns: a span of the second; `None` is all.

        Raises:
            CheckpointError: the disk does not give it.
        """
        size = element_bytes(spec.dtype)
        width = spec.shape[1] if len(spec.shape) > 1 else 1
        spans = [(0, spec.shape[0])] if rows is None else rows
        first, last = columns or (0, width)
        count = sum(end - start for start, end in spans)
        shape = (count, last - first) if len(spec.shape) > 1 else (count,)
        result = torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype])
        if not result.numel():
            return result
        buffer, at = result.reshape(-1).view(torch.uint8).numpy().data, 0
        step = last - first  # a run of elements on disk: some of a row, or all rows of a span
        for start, end in spans:
            runs = [(start, end - start)] if step == width else [(row, 1) for row in range(start, end)]
            for row, many in runs:
                length = many * step * size
                self.read_into(spec, (row * width + first) * size, buffer[at : at + length])
                at += length
        return result

    def _read_bytes(self, start: int, count: int) -> bytes:
        try:
            return os.pread(self._fd, count, start)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from None


def element_bytes(dtype: str) -> int:
    """Return the bytes of one element of a safetensors dtype of whole bytes."""
    return DTYPE_BITS[dtype] // 8
