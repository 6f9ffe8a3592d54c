"""How does a file of requests become a file of answers? OpenAI's batch format, answers kept as they finish.

What runs the requests is anything with `BatchEngine.run`. A job that is killed, interrupted or out of disk space is
taken up by another run of it: what is answered stays, and no line is written twice.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tersor import files
from tersor.engine import openai_answer
from tersor.engine.batch_items import BatchEngine, Item, answer_once
from tersor.engine.batch_lines import BadLine, BatchInput, Dialect, Line, read_batch
from tersor.engine.batch_store import Store, errors_path, manifest_path
from tersor.engine.openai_body import EMBEDDINGS
from tersor.engine.outputs import ABORT, ERROR, Answer, EmbeddingRequestOutput, RequestOutput
from tersor.errors import InputError, TersorError
from tersor.version import __version__

INTERRUPTED = 130
"""Exit status of a job that was interrupted: that of a shell for SIGINT."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is.

    Attributes:
        total: lines of the file.
        done: requests answered, those of earlier runs included.
        failed: lines that are no requests, and requests that failed.
        before: of both, how many were settled when this run began to compute.
        seconds: since then.
        drawn: tokens of the answers since then.
    """

    total: int
    done: int
    failed: int
    before: int
    seconds: float
    drawn: int

    @property
    def rate(self) -> float:
        """Requests a second of this run."""
        return (self.done + self.failed - self.before) / self.seconds if self.seconds else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that the rest will take at this rate, `None` before there is one."""
        rest = self.total - self.done - self.failed
        return rest / self.rate if self.rate else (None if rest else 0.0)


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a job.

    Attributes:
        progress: at its end.
        output, errors: the files.
        interrupted: whether it was told to stop before all was settled.
    """

    progress: Progress
    output: Path
    errors: Path
    interrupted: bool

    @property
    def exit_status(self) -> int:
        """0 where every line is settled, bad ones too; else `INTERRUPTED`."""
        return INTERRUPTED if self.interrupted else 0

    @property
    def message(self) -> str:
        """One line that says what is done and how to go on."""
        now = self.progress
        failed = f", {now.failed} failed (see {self.errors})" if now.failed else ""
        if self.interrupted:
            return f"stopped: {now.done} of {now.total} answered{failed}; run again with --resume to go on"
        return f"{now.done} of {now.total} answered in {self.output}{failed}"


@contextmanager
def draining(on_stop: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Take the first SIGINT or SIGTERM as a wish to stop soon, and yield what says whether there was one.

    A second SIGINT is a KeyboardInterrupt. Only the main thread can be told: elsewhere nothing is taken.

    Args:
        on_stop: is called at the first.
    """
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()
        on_stop()

    if threading.current_thread() is not threading.main_thread():
        yield stopped.is_set
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_batch(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    engine: BatchEngine,
    dialect: Dialect,
    *,
    model: str,
    identity: Mapping[str, Any],
    models: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    errors: str | os.PathLike[str] | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_stop: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.time,
) -> Report:
    """Answer the requests of a file.

    Args:
        source: the batch file.
        output: gets a line an answer, in the order in which they finish.
        engine: answers prompts.
        dialect: of its model.
        model: its name, as answers give it.
        identity: what else the answers depend on, as JSON values, such as a hash of the model's weights.
        models: names that a request may give the model; empty allows all.
        defaults: options of sampling that a request has which does not give them.
        errors: gets a line a failure; by default beside the output.
        resume: whether a job that was begun is continued.
        retry_failed: whether requests that failed in an earlier run are run again.
        on_progress: is called when computing begins, and after every request.
        on_stop: is called when the job is told to stop.
        clock: tells the time, for `created`.

    Raises:
        InputError: the file cannot be read or is empty, two files are the same, or the output is of another job.
        OutputError: the disk does not let us write. What is written stays, and the job can be continued; where it has
            run nothing yet, nothing stays.
        TersorError: the engine fails, or cannot be made. The same holds.
    """
    paths = _paths(source, output, errors)
    with draining(on_stop) as stopping:
        batch = read_batch(paths[0], dialect, models=models, defaults=defaults)
        known = {"input": batch.sha256, "model": model, **identity, "sampling": dict(defaults or {})}
        known["tersor"] = __version__
        store = Store(paths[1], paths[2], known, resume=resume, retry_failed=retry_failed, clock=clock)
        try:
            job = _Job(batch, store, dialect, model, on_progress)
            job.report_bad()
            job.run(engine, stopping)
        except Exception:
            store.withdraw()
            raise
        finally:
            try:
                store.sync()
            finally:
                store.close()
        return Report(job.progress(), paths[1], paths[2], job.unsettled > 0)


def _paths(source: str | os.PathLike[str], output: str | os.PathLike[str], errors: Any) -> tuple[Path, Path, Path]:
    try:
        given, out = files.user_path(source), files.user_path(output)
        _check_target(out)
        wrong = files.user_path(errors) if errors is not None else errors_path(out)
        _check_target(wrong)
        for name, path in (("output", out), ("error file", wrong)):
            for other, what in ((given, "input"), (manifest_path(out), "manifest of the output")):
                if _same(path, other):
                    raise InputError(f"the {name} is {path}: that is the {what}, too")
        if _same(out, wrong):
            raise InputError(f"output and error file are both {out}")
    except OSError as error:
        raise InputError(f"cannot take {error.filename}: {error.strerror}") from None
    return given, out, wrong


def _check_target(path: Path) -> None:
    if not files.check_target(path):
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


class _Job:
    """One run of a job: what it still has to do, and what comes of it."""

    def __init__(
        self, batch: BatchInput, store: Store, dialect: Dialect, model: str, on_progress: Callable[[Progress], None]
    ) -> None:
        self._batch, self._store, self._dialect, self._model = batch, store, dialect, model
        self._on_progress = on_progress
        settled = store.answered | store.failed
        self._lines = {line.number: line for line in batch.lines if line.custom_id not in settled}
        self._parts: dict[int, dict[int, Answer]] = {}
        self._before, self._begun, self._drawn = 0, time.monotonic(), 0

    @property
    def unsettled(self) -> int:
        """Requests that are neither answered nor failed."""
        return len(self._lines)

    def progress(self) -> Progress:
        store = self._store
        done, failed = len(store.answered), len(store.failed) + len(self._batch.bad)
        total = len(self._batch.lines) + len(self._batch.bad)
        return Progress(total, done, failed, self._before, time.monotonic() - self._begun, self._drawn)

    def report_bad(self) -> None:
        for bad in self._batch.bad:
            if bad.number not in self._store.reported:
                self._store.fail(self._failure(bad.custom_id, f"\0line {bad.number}", bad))

    def run(self, engine: BatchEngine, stopping: Callable[[], bool]) -> None:
        items = [
            Item(f"{line.number}.{part}", tokens, params)
            for line in self._lines.values()
            for part, (tokens, params) in enumerate(zip(line.prompts, line.params, strict=True))
        ]
        now = self.progress()
        self._before, self._begun = now.done + now.failed, time.monotonic()
        self._on_progress(self.progress())
        if not items or stopping():
            return
        for answer in answer_once(engine, items, stopping):
            self._take(answer)
        if self._lines and not stopping():
            raise TersorError(
                f"the engine ended with {len(self._lines)} requests not answered: run again with --resume to go on"
            )

    def _take(self, answer: Answer) -> None:
        number, part = map(int, answer.request_id.split("."))
        line = self._lines.get(number)
        if line is None:  # answered already: a lost worker's answer that came after all, or a prompt that failed
            return
        parts = self._parts.setdefault(number, {})
        parts[part] = answer
        if isinstance(answer, RequestOutput):
            self._drawn += sum(len(one.token_ids) for one in answer.outputs)
        reason = _failed(answer)
        if reason is None and len(parts) < len(line.prompts):
            return
        if reason is None:
            self._store.answer(self._answer(line, [parts[index] for index in range(len(line.prompts))]))
        else:
            self._store.fail(self._failure(line.custom_id, line.custom_id, reason))
        del self._lines[number], self._parts[number]
        self._on_progress(self.progress())

    def _answer(self, line: Line, answers: list[Any]) -> dict[str, Any]:
        name = self._name(line.custom_id)
        if line.ask.url == EMBEDDINGS:
            body = openai_answer.embeddings(answers, model=self._model, as_base64=line.ask.base64)
        else:
            body = self._dialect.answer(line.ask, answers, name=name, model=self._model, created=self._store.created)
        response = {"status_code": 200, "request_id": f"req_{name}", "body": body}
        return {"id": f"batch_req_{name}", "custom_id": line.custom_id, "response": response, "error": None}

    def _failure(self, custom_id: str | None, name: str, reason: BadLine | str) -> dict[str, Any]:
        entry: dict[str, Any] = {"id": f"batch_req_{self._name(name)}", "custom_id": custom_id, "response": None}
        if isinstance(reason, BadLine):
            return entry | {"error": {"code": reason.code, "message": reason.message}, "line": reason.number}
        return entry | {"error": {"code": "engine_error", "message": reason}}

    def _name(self, name: str) -> str:
        """Return what is the same in every run of the job, and for no other request."""
        return hashlib.sha256(f"{self._batch.sha256}\0{name}".encode()).hexdigest()[:24]


def _failed(answer: Answer) -> str | None:
    if answer.error is not None or isinstance(answer, EmbeddingRequestOutput):
        return answer.error
    ended = {one.finish_reason for one in answer.outputs} & {ERROR, ABORT, None}
    return f"the engine ended it with {ended.pop() or 'nothing'}" if ended else None
