"""Which tasks does a user mean, and what does a model reach at them? By lm-eval's own code."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from tersor import files
from tersor.errors import InputError, TersorError, did_you_mean, one_line
from tersor.integrations.lm_eval.model import Answering, EngineLM

SUFFIXES = (".yaml", ".yml")

RESAMPLES = 1000
"""Of the documents, for the standard error of a metric that has none in closed form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """Tasks that are there.

    Attributes:
        names: as lm-eval knows them.
        manager: of lm-eval, which loads them.
    """

    names: tuple[str, ...]
    manager: TaskManager


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """What a model reached at a task by one metric.

    Attributes:
        label: of the model.
        task: its name, or that of a group.
        metric: its name; behind a comma the filter of answers, where there is one.
        value: `None` where it is no finite number.
        error: its standard error as lm-eval gives it, or `None`.
        documents: how many were used, `None` of a group.
    """

    label: str
    task: str
    metric: str
    value: float | None
    error: float | None
    documents: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)


def find(text: str) -> Tasks:
    """Find tasks before anything is computed.

    Args:
        text: names, which may hold `*`, YAML files and folders of those, with commas between. lm-eval's own tasks take
            seconds to list, and are looked at only where a name asks for one.

    Raises:
        InputError: a name, file or folder without a task.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise InputError("--tasks names no task: give a name such as hellaswag, a YAML file or a folder of them")
    local = {word: _local(word) for word in words if _is_path(word)}
    folders = list(dict.fromkeys(str(folder) for folder, _ in local.values()))
    try:
        with _quiet():
            manager = TaskManager(include_path=folders or None, include_defaults=len(local) < len(words))
    except Exception as error:  # a broken file of a task raises whatever it raises
        raise InputError(f"--tasks {text}: lm-eval cannot read them: {one_line(error)}") from error
    names: list[str] = []
    for word in words:
        found = local[word][1] if word in local else manager.match_tasks([word])
        if not found:
            near = did_you_mean(word, manager.all_tasks)
            raise InputError(f"--tasks {word!r}{near}: lm-eval has no such task, and there is no such file or folder")
        names += found
    return Tasks(names=tuple(dict.fromkeys(names)), manager=manager)


def run(
    tasks: Tasks,
    llm: Answering,
    label: str,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[TaskScore]:
    """Answer tasks, and return what the model reached, in the order of tasks and their metrics.

    Args:
        tasks: from `find`.
        llm: answers.
        label: of the model.
        limit: documents of each task at most.
        progress: called with (requests done, requests in all) of each kind of request.

    Raises:
        TersorError: a task that cannot be loaded (a data set that is not there, code of its own), or a request that
            failed.
    """
    try:
        with _without_commit(), _quiet():
            found: Any = evaluator.simple_evaluate(
                EngineLM(llm, progress),
                tasks=list(tasks.names),
                task_manager=tasks.manager,
                limit=limit,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
            )
    except TersorError:
        raise
    except Exception as error:  # lm-eval, data sets and code of tasks raise whatever they raise
        raise TersorError(f"{label}: lm-eval cannot run {', '.join(tasks.names)}: {one_line(error)}") from error
    counts = found.get("n-samples", {})
    scores = []
    for task, values in found["results"].items():
        for metric, value in values.items():
            name, _, answers = metric.partition(",")
            if not answers or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            scores.append(
                TaskScore(
                    label=label,
                    task=task,
                    metric=name if answers == "none" else f"{name},{answers}",
                    value=_finite(value),
                    error=_finite(values.get(f"{name}_stderr,{answers}")),
                    documents=counts.get(task, {}).get("effective"),
                )
            )
    return scores


@contextmanager
def _quiet() -> Iterator[None]:
    """Have lm-eval say errors alone, and leave its logger as it was."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _without_commit() -> Iterator[None]:
    """Keep lm-eval from asking git for the commit of the working directory: where that has none git says `fatal`."""
    asks: Any = evaluator
    known = asks.get_git_commit_hash
    asks.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        asks.get_git_commit_hash = known


def _is_path(word: str) -> bool:
    return word.endswith(SUFFIXES) or "/" in word or Path(word).is_dir()


def _local(word: str) -> tuple[Path, list[str]]:
    """Return the folder of a task's file, or of several, and the names of the tasks there.

    Raises:
        InputError: there is none.
    """
    try:
        path = files.user_path(word)
        if path.is_file():
            name = _name(path)
            if name is None:
                raise InputError(f"--tasks {word}: the file names no task: it has no field `task` or `group`")
            return path.resolve().parent, [name]
        if not path.is_dir():
            raise InputError(f"--tasks {word}: no such file or folder")
        inside = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    except OSError as error:
        raise InputError(f"--tasks {word}: cannot be read: {error.strerror}") from None
    names = [name for file in inside if (name := _name(file)) is not None]
    if not names:
        raise InputError(f"--tasks {word}: the folder holds no YAML file with a field `task` or `group`")
    return path.resolve(), names


def _name(path: Path) -> str | None:
    """Return the name of the task, or group of tasks, that a file describes; `None` of one that others include.

    Raises:
        InputError: the file is no YAML.
    """
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Names)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--tasks {path}: no YAML: {one_line(error)}") from None
    if not isinstance(found, Mapping):
        return None
    named = (found.get("group"), found.get("task"))
    return next((name for name in named if isinstance(name, str)), None)


class _Names(yaml.SafeLoader):
    """Reads what tags of its own do not stand before: `!function` names code, which only lm-eval loads."""


_Names.add_multi_constructor("!", lambda loader, suffix, node: None)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
