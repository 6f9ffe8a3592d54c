"""The one way to write a file whole or not at all: a temporary name beside it, synced, renamed, the directory synced.

And the one way to take a path that a user wrote: whatever is wrong with it is an `OSError`, too.

Errors are the operating system's own; whoever writes says in its own words what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path

SUFFIX = ".tmp"
"""How temporary names end: a file called so was left by a process that was killed, and may be removed."""


def user_path(text: str | os.PathLike[str]) -> Path:
    """Return a path as a user wrote it, `~` expanded.

    Raises:
        OSError: no file system takes it (empty, a NUL, a character that cannot be in a name), or it begins with the
            home of a user who is not there.
    """
    name = os.fspath(text)
    if not name:
        raise OSError(errno.EINVAL, "the path is empty", name)
    if "\0" in name:
        raise OSError(errno.EINVAL, "the path holds a NUL character", name)
    try:
        os.fsencode(name)
        return Path(name).expanduser()
    except UnicodeEncodeError:
        raise OSError(errno.EINVAL, "the path holds a character that no file name can have", name) from None
    except RuntimeError:
        raise OSError(errno.ENOENT, "no such user", name) from None


def mode_of(path: Path) -> int:
    """Return the mode of what a path leads to, 0 where there is nothing.

    Raises:
        OSError: it cannot be looked at (permission, a loop of links, a name too long, a file where a folder should be).
    """
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return 0


def check_target(path: Path) -> bool:
    """Check before long work that a file can be written after it; return whether its folder is there.

    Raises:
        OSError: it cannot.
    """
    if stat.S_ISDIR(mode_of(path)):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISDIR(mode_of(path.parent)):
        return False
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return True


def write_whole(path: Path, content: bytes | Iterable[bytes | memoryview], *, durable: bool = True) -> None:
    """Write a file durably. Nobody sees a part of it, also where several threads or processes write it at once.

    Args:
        path: what the file is called in the end; a file of that name is replaced.
        content: all of it, in one piece or in several.
        durable: whether it also outlasts the machine. What does not outlasts its process, and need not reach the disk
            where it is removed soon.

    Raises:
        OSError: the file cannot be written; there is then no temporary file either.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if durable:
            rename(temporary, path)
        else:
            os.replace(temporary, path)
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
