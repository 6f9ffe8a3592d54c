"""How far did an interrupted run come, and was it the same run? A small file beside the shards it wrote."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tersor import files
from tersor.checkpoint.writer import output_error, write_file
from tersor.convert.report import Row
from tersor.errors import InputError

STATE_NAME = "tersor-state.json"


def partial_directory(output: Path) -> Path:
    """Return where an output is made before it gets its name."""
    return output.with_name(output.name + ".partial")


class Workplace:
    """The directory an output is made in, locked as long as its context lasts, with the record of what is finished.

    Attributes:
        directory: `<output>.partial`.
        output: the output's final name.
        rows: for each finished shard, in order, its rows of the report.
    """

    def __init__(self, output: Path, identity: dict[str, Any], resume: bool) -> None:
        """Create the directory, or take up the one an interrupted run left.

        Args:
            output: the output's final name.
            identity: what the result depends on: options and source, as JSON values.
            resume: whether an existing directory may be taken up.

        Raises:
            InputError: the directory exists and `resume` is false, or it belongs to other options or another source, or
                another process is writing it.
            OutputError: the disk does not let us write.
        """
        self.directory = partial_directory(output)
        self.rows: list[list[Row]] = []
        self.output = output
        self._identity = json.loads(json.dumps(identity, allow_nan=False))
        try:
            exists = bool(files.mode_of(self.directory))
        except OSError as error:
            raise output_error(error, self.directory) from None
        if exists and not resume:
            raise InputError(
                f"{self.directory} is left from an interrupted run: add --resume to continue it, or remove it"
            )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise output_error(error, self.directory) from None
        try:
            self._lock()
            if (self.directory / STATE_NAME).exists():
                self._load()
                files.remove_leftovers(self.directory)
            elif exists and any(self.directory.iterdir()):
                raise InputError(f"{self.directory} has no {STATE_NAME}, so it cannot be continued: remove it")
            else:
                self._save()
        except OSError as error:
            self.close()
            raise output_error(error, self.directory) from None
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing {self.directory}: wait for it or end it") from None

    def _load(self) -> None:
        path = self.directory / STATE_NAME
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            identity, shards = state["identity"], state["shards"]
            self.rows = [[Row.from_dict(row) for row in shard["rows"]] for shard in shards]
            sizes = [(self.directory / shard["file"], shard["bytes"]) for shard in shards]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}): remove {self.directory} and start again") from None
        _compare(identity, self._identity, self.directory)
        for file, size in sizes:
            if not file.is_file() or file.stat().st_size != size:
                raise InputError(f"{file} is not as it was finished: remove {self.directory} and start again")

    def _save(self, names: Sequence[str] = ()) -> None:
        shards = [
            {
                "file": name,
                "bytes": (self.directory / name).stat().st_size,
                "rows": [dataclasses.asdict(row) for row in rows],
            }
            for name, rows in zip(names, self.rows, strict=True)
        ]
        content = json.dumps({"identity": self._identity, "shards": shards}, indent=1, allow_nan=False)
        write_file(self.directory / STATE_NAME, content.encode())

    def finished(self, rows: list[Row], names: list[str]) -> None:
        """Record one more finished shard; `names` are the files of all finished ones."""
        self.rows.append(rows)
        self._save(names)

    def publish(self) -> None:
        """Give the directory its final name; the record goes after that, so that whatever ends this can be continued.

        Raises:
            OutputError: the disk does not let us.
        """
        try:
            os.fsync(self._fd)
            files.rename(self.directory, self.output)
        except OSError as error:
            raise output_error(error, self.output) from None
        with contextlib.suppress(OSError):
            (self.output / STATE_NAME).unlink()
            os.fsync(self._fd)

    def discard(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Release the lock; where the input is at fault there is nothing to continue, and everything goes."""
        if isinstance(error, InputError):
            self.discard()
        self.close()

    def close(self) -> None:
        """Release the lock; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _compare(before: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            if key == "weights":
                what = "the source has changed since"
            else:
                what = f"it was made with {key} {_short(before.get(key))}, now {_short(now.get(key))}"
            raise InputError(f"{directory} cannot be continued: {what}; use the same options, or remove it")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
