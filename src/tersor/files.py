"""The one way to write a file whole or not at all: a temporary name beside it, synced, renamed, the directory synced.

Errors are the operating system's own; whoever writes says in its own words what they mean.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

SUFFIX = ".tmp"
"""How temporary names end: a file called so was left by a process that was killed, and may be removed."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file durably. Nobody sees a part of it, also where several threads or processes write it at once.

    Args:
        path: what the file is called in the end; a file of that name is replaced.
        content: all of it.

    Raises:
        OSError: the file cannot be written; there is then no temporary file either.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def rename(temporary: Path, path: Path) -> None:
    """Give a synced file or directory its name in the same directory, durably; a file of that name is replaced.

    Raises:
        OSError: the file system does not let us.
    """
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    Raises:
        OSError: the directory cannot be opened or synced.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files below a directory that only this process writes in."""
    for path in directory.rglob(f"*{SUFFIX}"):
        path.unlink(missing_ok=True)
