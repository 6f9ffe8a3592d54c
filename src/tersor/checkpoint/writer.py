"""How does a shard come to disk? The header first, rows into their places, then one rename.

Shapes are known before the first weight is read, so the header is written first and every tensor's bytes can arrive in
any order and from several threads. The same tensors give the same bytes.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from tersor import files
from tersor.checkpoint.header import TensorSpec, build, lay_out
from tersor.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_METADATA = {"format": "pt"}


def output_error(error: OSError, path: Path) -> OutputError:
    """Say in one line why `path` could not be written."""
    if error.errno in _FULL:
        return OutputError(
            f"no space left while writing {path} ({error.strerror}): free some and run again with --resume"
        )
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def write_file(path: Path, content: bytes) -> None:
    """Write a small file of an output whole or not at all.

    Raises:
        OutputError: the disk is full or does not let us write.
    """
    try:
        files.write_whole(path, content)
    except OSError as error:
        raise output_error(error, path) from None


class ShardWriter:
    """One safetensors file being written under a temporary name.

    Attributes:
        path: the file's final name, which exists after `finish` and not before.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        """Create the file and write its header.

        Raises:
            OutputError: the disk is full or does not let us write.
        """
        self.path = path
        self._temporary = path.with_name(path.name + files.SUFFIX)
        placed = lay_out(specs)
        self._places = {spec.name: spec for spec in placed}
        header = build(placed, _METADATA)
        self._data_start = len(header)
        self._missing = sum(spec.nbytes for spec in placed)
        self._lock = threading.Lock()
        try:
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise output_error(error, path) from None
        try:
            self._write_at(0, memoryview(header))
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write bytes of tensor `name` from byte `start` of the tensor on; any thread, each byte once.

        Raises:
            OutputError: the disk is full or does not let us write.
        """
        spec = self._places[name]
        assert start + data.nbytes <= spec.nbytes, f"{name}: {start} + {data.nbytes} > {spec.nbytes}"
        self._write_at(self._data_start + spec.offset + start, data.cast("B"))
        with self._lock:
            self._missing -= data.nbytes

    def _write_at(self, position: int, data: memoryview) -> None:
        try:
            while len(data):
                count = os.pwrite(self._fd, data, position)
                data = data[count:]
                position += count
        except OSError as error:
            raise output_error(error, self.path) from None

    def finish(self) -> None:
        """Sync the file and give it its final name.

        Raises:
            OutputError: the disk is full or does not let us write.
        """
        assert self._missing == 0, f"{self.path}: {self._missing} bytes were never written"
        try:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            files.rename(self._temporary, self.path)
        except OSError as error:
            raise output_error(error, self.path) from None

    def abort(self) -> None:
        """Remove what was written; does nothing after `finish`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._temporary.unlink(missing_ok=True)


def split_into_shards(groups: Sequence[Sequence[TensorSpec]], shard_bytes: int) -> list[list[int]]:
    """Share groups of tensors out to files, in order, each at most `shard_bytes` unless a single group is larger.

    Args:
        groups: tensors that stay together (a weight and its scales).
        shard_bytes: bytes of tensors in a file.

    Returns:
        For each file the indices of its groups.
    """
    shards: list[list[int]] = [[]]
    filled = 0
    for index, group in enumerate(groups):
        size = sum(spec.nbytes for spec in group)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += size
    return shards


def shard_names(count: int) -> list[str]:
    """Return the file names transformers expects of `count` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
