"""Where are compiled kernels kept? Files named by a hash of everything that can change them.

    TERSOR_CACHE_DIR/jit/<two hex digits>/<sha256>.kernel        a binary, its checksum and its log
    TERSOR_CACHE_DIR/jit/<two hex digits>/lock                   held while one of that folder is compiled

Processes share the cache: an entry appears whole or not at all (`tersor.files`). An entry that does not match its
checksum is built again. Removing any file at any time is safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from tersor import files, settings
from tersor.kernels.jit import nvrtc
from tersor.kernels.jit.source import KernelSource

FORMAT = 1
"""Version of the entry's layout and of the translation unit's text."""

LOCK_SECONDS = 60.0
"""How long a process waits for another that compiles the same kernel before it compiles on its own."""

_MAGIC = b"tersor-kernel-1\n"
_LENGTH_BYTES = 8


def directory() -> Path:
    """Return the folder of the entries (it need not exist)."""
    return Path(settings.get("TERSOR_CACHE_DIR")) / "jit"


def key(source: KernelSource, arch: str) -> str:
    """Return the sha256, in hex, of everything that can change the binary of `source` for `arch`."""
    parts = (str(FORMAT), source.digest(), arch, " ".join(nvrtc.OPTIONS), nvrtc.identity())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load(entry_key: str) -> nvrtc.Binary | None:
    """Read an entry; `None` when there is none or when it is not what was written."""
    try:
        blob = _path(entry_key).read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + hashlib.sha256().digest_size
    checksum, body = blob[len(_MAGIC) : start], blob[start:]
    if not blob.startswith(_MAGIC) or hashlib.sha256(body).digest() != checksum:
        return None
    size = int.from_bytes(body[:_LENGTH_BYTES], "little")
    header = json.loads(body[_LENGTH_BYTES : _LENGTH_BYTES + size])
    return nvrtc.Binary(data=body[_LENGTH_BYTES + size :], **header)


def store(entry_key: str, binary: nvrtc.Binary) -> None:
    """Publish an entry; a cache that cannot be written is a warning, since the kernel itself is there."""
    header = json.dumps({"name": binary.name, "arch": binary.arch, "log": binary.log}, allow_nan=False).encode()
    body = len(header).to_bytes(_LENGTH_BYTES, "little") + header + binary.data
    blob = _MAGIC + hashlib.sha256(body).digest() + body
    path = _path(entry_key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, blob)
    except OSError as error:
        warnings.warn(
            f"the kernel cache {path.parent} cannot be written ({error.strerror}), kernels are compiled "
            "again in every process: set TERSOR_CACHE_DIR to a writable directory",
            RuntimeWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def lock(entry_key: str) -> Iterator[None]:
    """Hold the right to compile an entry, against threads and processes; after LOCK_SECONDS go without."""
    try:
        import fcntl

        folder = _path(entry_key).parent
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except (ImportError, OSError):  # no such locks here, or a read-only cache: two may compile the same
        yield
        return
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def size() -> tuple[int, int]:
    """Return the number of entries and the bytes they take."""
    sizes = []
    for path in directory().glob("*/*.kernel"):
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes)


def clear() -> int:
    """Remove every entry and what a killed process left behind; return the number of entries removed."""
    removed = 0
    for path in [*directory().glob("*/*.kernel"), *directory().glob(f"*/*{files.SUFFIX}")]:
        with contextlib.suppress(OSError):
            path.unlink()
            removed += path.suffix == ".kernel"
    return removed


def _path(entry_key: str) -> Path:
    return directory() / entry_key[:2] / f"{entry_key}.kernel"
