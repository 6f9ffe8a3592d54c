"""What do models reach at tasks of lm-eval? Each is loaded into the engine, asked, and let go."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from tersor.evaluate.subjects import Subject
from tersor.integrations import lm_eval
from tersor.integrations.transformers.load import Found
from tersor.llm import LLM

if TYPE_CHECKING:
    from tersor.integrations.lm_eval.tasks import Tasks, TaskScore

SEED = 0
"""Of tasks that draw: the same model answers the same way again."""


def find_tasks(text: str) -> Tasks:
    """Find tasks by names of lm-eval, YAML files and folders of those, with commas between.

    Raises:
        UnsupportedError: lm-eval is not installed.
        InputError: a name, file or folder without a task.
    """
    lm_eval.check()
    from tersor.integrations.lm_eval import tasks

    return tasks.find(text)


def run_tasks(
    tasks: Tasks,
    subjects: Sequence[Subject],
    found: Mapping[str, Found],
    device: torch.device,
    *,
    dtype: str = "auto",
    limit: int | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> list[TaskScore]:
    """Have each model answer tasks in the engine, one model in memory at a time.

    Args:
        tasks: from `find_tasks`.
        subjects: the models and how they run.
        found: where the checkpoint of each name is.
        device: where they run.
        dtype: of activations.
        limit: documents of each task at most.
        trust_remote_code: whether Python code that comes with a tokenizer is run.
        progress: shows what is asked, by its name; what it yields is called with (requests done, requests in all).

    Returns:
        What each reached, model by model.

    Raises:
        UnsupportedError: the engine does not run a model.
        TersorError: a task that cannot be loaded, or a request that failed.
    """
    from tersor.integrations.lm_eval.tasks import run

    scores: list[TaskScore] = []
    _release(device)
    for one in subjects:
        with progress(one.label) as move:
            llm = LLM(
                found[one.name].directory,
                device=str(device),
                dtype=dtype,
                activations=str(one.activations),
                kv_dtype=one.pages.kv_dtype,
                seed=SEED,
                trust_remote_code=trust_remote_code,
            )
            try:
                scores += run(tasks, llm, one.label, limit=limit, progress=move)
            finally:
                llm.close()
        del llm
        _release(device)
    return scores


def _release(device: torch.device) -> None:
    """Give memory that nobody uses back to the device: an engine takes what is free there when it starts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
