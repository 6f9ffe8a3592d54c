"""What becomes of weights where no text says what their layers read? Each is finished by itself."""

from __future__ import annotations

from pathlib import Path

import torch

from tersor.checkpoint.conversion import Conversion
from tersor.convert.calibrate.coder import Coder
from tersor.convert.calibrate.store import Store
from tersor.convert.calibrate.tasks import Site, Task, matrices, read_tensor
from tersor.convert.pipeline import Progress, Ready, located
from tersor.errors import FormatError, NonFiniteError


def code_alone(
    conversion: Conversion, coder: Coder, directory: Path, device: torch.device, progress: Progress | None
) -> dict[int, Ready]:
    """Finish all weights that are not finished yet; each is kept as a block of a calibration is.

    Args:
        conversion: what becomes of every tensor, none of them experts of a layer in one.
        coder: what becomes of weights, without statistics.
        directory: where the output is made; what is finished stands in its folder `calibration`.
        device: where the work is done.
        progress: called after every weight.

    Returns:
        The packed weights by their steps.

    Raises:
        NonFiniteError, FormatError: of a weight, which is named.
        CheckpointError: the source cannot be read.
        OutputError: the output cannot be written.
        TersorError: a GPU cannot have its kernels.
    """
    store, ready, done = Store(directory), dict[int, Ready](), 0
    tasks = [
        Task(index, step, index, Site(""), step.source.spec.name)
        for index, step in enumerate(conversion.steps)
        if step.scheme is not None
    ]
    total = sum(task.step.source.spec.nbytes for task in tasks)
    coder.prepare(tasks, device)
    if progress is not None:
        progress(0, total, "")
    for task in tasks:
        if not store.has(task.block):
            _finish(task, coder, store, device)
        ready |= store.ready(store.record(task.block))
        done += task.step.source.spec.nbytes
        if progress is not None:
            progress(done, total, task.name)
    return ready


def _finish(task: Task, coder: Coder, store: Store, device: torch.device) -> None:
    weight = matrices(task.step, read_tensor(task.step)).to(device)
    try:
        found = coder.code(task, weight, {}, 0)
    except (NonFiniteError, FormatError) as error:
        raise located(task.step, error) from None
    steps = {task.index: [found.squared_error, found.squared_norm, sorted(found.underflowed)]}
    tensors = {f"{task.index}.{name}": tensor for name, tensor in found.tensors.items()}
    store.finish(task.block, tensors, {"block": task.block, "steps": steps})


def alone_bytes(conversion: Conversion, directory: Path) -> int:
    """Return how many bytes more are taken while the work lasts, by finished weights."""
    needed = sum(step.output_bytes for step in conversion.steps if step.scheme is not None)
    return max(0, needed - Store.held_bytes(directory))
