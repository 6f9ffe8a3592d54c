"""What is answered already, and is it durable? The files that a batch job leaves, and that another run takes up.

Beside the output stand the error file and a manifest: what the answers depend on, written before the first of them.
Both files are only appended to, whole lines in one write, and synced every so often; a run that was killed leaves at
most one torn line, which the next one cuts off.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tersor import files
from tersor.errors import InputError, OutputError

SYNC_LINES, SYNC_SECONDS = 64, 2.0
"""A file is synced after so many lines, or at the first one after so long."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def errors_path(output: Path) -> Path:
    """Return where errors go that are not told a place: out.jsonl has out.errors.jsonl."""
    return output.with_name(f"{output.stem}.errors{output.suffix}")


def manifest_path(output: Path) -> Path:
    """Return where the manifest of an output is."""
    return output.with_name(f"{output.name}.manifest.json")


def _output_error(error: OSError, path: Path) -> OutputError:
    if error.errno in _FULL:
        return OutputError(
            f"no space left while writing {path} ({error.strerror}): free some and run again with --resume"
        )
    return OutputError(f"cannot write {path}: {error.strerror or error}")


class _Appender:
    """A file of JSON lines that only grows, locked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unsynced, self._synced = 0, time.monotonic()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _output_error(error, path) from None
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise InputError(f"{path} is no plain file: answers are appended to it and read again by --resume")
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.size = os.fstat(self._fd).st_size
        except BlockingIOError:
            self.close()
            raise InputError(f"another process is writing {path}: wait for it or end it") from None
        except BaseException:
            self.close()
            raise

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield what is in the file, and cut off a last line that was not written whole."""
        whole, torn, number = 0, "", 0
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if torn:
                    raise InputError(f"{self.path} line {number - 1} {torn}: it is not as a batch job left it")
                try:
                    entry = json.loads(raw)
                except ValueError as error:
                    torn = f"is not JSON ({error})"
                    continue
                if not raw.endswith(b"\n"):
                    break
                if not isinstance(entry, dict):
                    raise InputError(f"{self.path} line {number} is no object: it is not as a batch job left it")
                whole += len(raw)
                yield entry
        if whole < self.size:
            self._cut(whole)

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line, whole or not at all, and sync now and then."""
        line = memoryview(json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        try:
            rest = line
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            with contextlib.suppress(OutputError):
                self._cut(self.size)
            raise _output_error(error, self.path) from None
        self.size += len(line)
        self._unsynced += 1
        if self._unsynced >= SYNC_LINES or time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def replace(self, entries: list[dict[str, Any]]) -> None:
        """Put other entries in place of all there are."""
        self._cut(0)
        for entry in entries:
            self.append(entry)
        self.sync()

    def sync(self) -> None:
        """Make what was written durable."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _output_error(error, self.path) from None
        self._unsynced, self._synced = 0, time.monotonic()

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise _output_error(error, self.path) from None
        self.size = size

    def close(self) -> None:
        """Release the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Store:
    """The files of one batch job.

    Attributes:
        answered: custom_ids that are in the output.
        failed: custom_ids of requests that failed when they ran, and are in the error file.
        reported: numbers of the lines that are in the error file.
        created: when the job was begun, seconds since 1970; the same in every run of it.
    """

    def __init__(
        self,
        output: Path,
        errors: Path,
        identity: dict[str, Any],
        *,
        resume: bool = False,
        retry_failed: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin a job, or take up one.

        Args:
            output: of the answers.
            errors: of lines that are no requests, and of requests that failed.
            identity: what the answers depend on, as JSON values.
            resume: whether a job that was begun is taken up; one that was not is begun.
            retry_failed: whether requests that failed are run again.
            clock: tells the time.

        Raises:
            InputError: there is an output, and `resume` is false or the identity another; or another process writes it.
            OutputError: the disk does not let us write.
        """
        self.answered: set[str] = set()
        self.failed: set[str] = set()
        self.reported: set[int] = set()
        self._identity = json.loads(json.dumps(identity, allow_nan=False))
        self._manifest = manifest_path(output)
        self._new = False
        self._files: list[_Appender] = []
        self._made: list[Path] = []
        try:
            self._output = self._open(output)
            self._errors = self._open(errors)
            begun = self._begun(resume)
            self.created = int(clock()) if begun is None else begun
            if begun is None:
                content = {"identity": self._identity, "created": self.created}
                files.write_whole(self._manifest, json.dumps(content, indent=1).encode())
                self._new = True
            else:
                self._take_up(retry_failed)
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._remove_made()
            self.close()
            if isinstance(error, OSError):
                raise _output_error(error, self._manifest) from None
            raise

    def _remove_made(self) -> None:
        """Remove the files that were not there before and hold nothing."""
        for path in self._made:
            if path.exists() and not path.stat().st_size:
                path.unlink()

    def _open(self, path: Path) -> _Appender:
        new = not path.exists()
        self._files.append(_Appender(path))
        if new:
            self._made.append(path)
        return self._files[-1]

    def _begun(self, resume: bool) -> int | None:
        """Return when the job was begun, `None` where it was not."""
        output = self._output.path
        try:
            state = json.loads(self._manifest.read_bytes())
            identity, created = dict(state["identity"]), int(state["created"])
        except FileNotFoundError:
            for file in self._files:
                if file.size:
                    how = "so it cannot be resumed" if resume else "so no batch job wrote it"
                    raise InputError(
                        f"{file.path} is there, but not {self._manifest.name}, {how}: remove it or name another file"
                    ) from None
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._manifest} cannot be read ({error}): remove it and {output}") from None
        if not resume:
            raise InputError(f"{output} is that of a job that was begun: add --resume to continue it, or remove it")
        for key in {**identity, **self._identity}:
            before, now = identity.get(key), self._identity.get(key)
            if before != now:
                raise InputError(
                    f"{output} cannot be resumed: it was made with {key} {_short(before)}, now {_short(now)}; "
                    "use the same, or another output"
                )
        return created

    def _take_up(self, retry_failed: bool) -> None:
        for entry in self._output.entries():
            self.answered.add(entry.get("custom_id", ""))
        kept, dropped = [], 0
        for entry in self._errors.entries():
            if entry.get("line") is not None:
                self.reported.add(entry["line"])
            elif retry_failed or entry.get("custom_id") in self.answered:
                dropped += 1
                continue
            else:
                self.failed.add(entry.get("custom_id", ""))
            kept.append(entry)
        if dropped:
            self._errors.replace(kept)

    def answer(self, entry: dict[str, Any]) -> None:
        """Append the answer to a request to the output.

        Raises:
            OutputError: the disk does not let us write; the file ends with the last whole line.
        """
        self._output.append(entry)
        self.answered.add(entry["custom_id"])

    def fail(self, entry: dict[str, Any]) -> None:
        """Append an entry to the error file: of a request that failed, or of a line that is none, with its number.

        Raises:
            OutputError: the disk does not let us write; the file ends with the last whole line.
        """
        self._errors.append(entry)
        if "line" in entry:
            self.reported.add(entry["line"])
        else:
            self.failed.add(entry["custom_id"])

    def withdraw(self) -> None:
        """Remove what a job made that was begun here and has run nothing, so that it may begin again in another way."""
        if not self._new or self.answered or self.failed:
            return
        with contextlib.suppress(OSError, OutputError):
            self._errors.replace([])
            self._remove_made()
            self._manifest.unlink(missing_ok=True)

    def sync(self) -> None:
        """Make all that was written durable.

        Raises:
            OutputError: the disk does not let us.
        """
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Release the files; idempotent."""
        for file in self._files:
            file.close()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
