"""Which kernels will an engine ask for? They are compiled side by side, while the weights are read or long before."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from tersor.checkpoint.source import Source
from tersor.engine.config import MANY_ROWS, EngineConfig
from tersor.errors import CheckpointError, UnsupportedError
from tersor.formats import float_dtype_or_auto
from tersor.hardware import Chip
from tersor.kernels.jit import KernelSource, arch_for, compile_many, missing
from tersor.models.decoder import Decoder
from tersor.models.kernels import Steps, kernels_of
from tersor.models.load import check_placed, described, multiplied, usual_dtype
from tersor.models.outline import outline
from tersor.ops import warm
from tersor.ops.attention_form import PAGE
from tersor.ops.dispatch import activations_for, kernel_chip
from tersor.planner.placement import Place

_log = logging.getLogger("tersor")


class _Stopped(Exception):
    """Nobody waits for the kernels any more."""


def kernels(model: Source, config: EngineConfig, chip: Chip, place: Place | None = None) -> list[KernelSource]:
    """Return every kernel that a rank of an engine can ask for, whatever it is asked.

    Args:
        model: the checkpoint; none of its weights is read.
        config: of the engine.
        chip: the GPU.
        place: of the rank; `None` is alone.

    Raises:
        UnsupportedError: the engine does not have the architecture, or weights do not take such activations.
        CheckpointError: no whole checkpoint.
        ShapeError: the model cannot be placed so.
    """
    decoder, names, _, schemes = described(model)
    dtype = float_dtype_or_auto(config.dtype) or usual_dtype(model, torch.device("cuda"))
    activations = activations_for(config.activations, multiplied(decoder, names, schemes), chip)
    parts = outline(decoder, names, schemes, dtype, activations, place)
    draws = place is None or (place.last and place.rank == 0)
    return kernels_of(parts, steps_of(config, decoder.context, draws=draws), chip)


def steps_of(config: EngineConfig, context: int, *, draws: bool = True) -> Steps:
    """Return what steps an engine has.

    Args:
        config: of the engine.
        context: of the model.
        draws: whether its rank draws tokens.
    """
    longest = min(config.max_length or context, context)
    queries = min(config.max_step_tokens, longest)
    length = -(-longest // PAGE) * PAGE
    return Steps(
        tokens=config.max_step_tokens,
        rows=min(config.max_rows or MANY_ROWS, config.max_step_tokens),
        queries=queries,
        length=length,
        pages=config.pages_dtype,
        draws=draws,
    )


def compile_all(sources: Sequence[KernelSource], chip: Chip, stop: threading.Event | None = None) -> None:
    """Compile what the cache does not have, side by side; the logger `tersor` is told of how many kernels, if any.

    Args:
        sources: the kernels.
        chip: the GPU.
        stop: once set, no further kernel is begun.

    Raises:
        KernelError: a kernel does not compile.
        UnsupportedError: NVRTC is not installed.
    """
    arch = arch_for(chip.capability)
    wanted = missing(sources, arch)
    if wanted:
        _log.info("compiling %d kernels for %s", len(wanted), arch)

    def go_on(*_: object) -> None:
        if stop is not None and stop.is_set():
            raise _Stopped

    compile_many(wanted, arch, on_done=go_on)


def compile_for(decoder: Decoder, steps: Steps) -> None:
    """Compile what steps of a decoder in memory ask for, as `compile_all` does; nothing where no GPU has kernels.

    Raises:
        KernelError, UnsupportedError: as `compile_all`.
    """
    chip = kernel_chip(decoder.device)
    if chip is not None:
        compile_all(kernels_of(decoder, steps, chip), chip)


@contextmanager
def compiling(find: Callable[[], Sequence[KernelSource]], chip: Chip | None) -> Iterator[None]:
    """Compile kernels beside what is done in the context; at its end they are there.

    Args:
        find: says which.
        chip: the GPU; `None` compiles nothing.

    Raises:
        KernelError, UnsupportedError: as `compile_all`, and whatever `find` raises.
    """
    if chip is None:
        yield
        return
    stop, mode = threading.Event(), contextvars.copy_context()
    with ThreadPoolExecutor(1, thread_name_prefix="compile") as pool:
        compiled = pool.submit(mode.run, lambda: compile_all(find(), chip, stop))
        try:
            yield
        except BaseException:
            stop.set()
            raise
        compiled.result()


def compile_ahead(
    model: str | Path,
    chips: Sequence[Chip],
    config: EngineConfig,
    *,
    fuse: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> warm.Compiled:
    """Compile every kernel that a model can ask for, in the engine and, where it is compressed, in transformers.

    Args:
        model: a checkpoint directory, or a hub id, which is downloaded.
        chips: what to compile for.
        config: of the engine; its activations count for transformers, too.
        fuse, revision, progress: as for `warm.compile_ahead`.

    Raises:
        InputError, KernelError, UnsupportedError: as for `warm.compile_ahead`.
        ShapeError: it cannot be placed as the config says.
    """

    def of_engine(source: Source, chip: Chip) -> list[KernelSource]:
        try:
            placed = check_placed(source, config.placed)
            places = [placed.place(rank) for rank in range(placed.ranks)]
            return [one for place in places for one in kernels(source, config, chip, place)]
        except (UnsupportedError, CheckpointError):
            return []  # the engine does not load it; transformers may

    return warm.compile_ahead(
        model, chips, activations=config.activations, fuse=fuse, revision=revision, also=of_engine, progress=progress
    )
