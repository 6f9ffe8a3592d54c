"""What does a rank need to run steps? Its part of the weights, a runner and pages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tersor.checkpoint.source import Source
from tersor.engine import ahead
from tersor.engine.config import EngineConfig
from tersor.engine.graphs import captures
from tersor.engine.memory import make_pages, rows_of
from tersor.engine.offloading import offload_of
from tersor.engine.orders import Line
from tersor.engine.runner import Runner
from tersor.engine.sampler import Sampler
from tersor.engine.sampler_news import Teller
from tersor.errors import InputError
from tersor.formats import float_dtype_or_auto
from tersor.kernels.jit import KernelSource
from tersor.models import Decoder, load
from tersor.models.config import DecoderConfig
from tersor.models.load import described, usual_dtype
from tersor.ops.collective import ALONE, Ranks
from tersor.ops.dispatch import kernel_chip
from tersor.ops.stages import ONE, Stages
from tersor.planner.placement import Place


@dataclass(frozen=True, slots=True)
class Built:
    """A rank that is ready.

    Attributes:
        runner: with its pages.
        pages: how many, on every rank the same.
        context: tokens of a text at most.
    """

    runner: Runner
    pages: int
    context: int


def build(
    source: Source,
    config: EngineConfig,
    device: torch.device,
    ranks: Ranks = ALONE,
    line: Line | None = None,
    stages: Stages = ONE,
    place: Place | None = None,
) -> Built:
    """Load a model, or a rank's part of it, compile its kernels meanwhile, and make its pages; all ranks do so at once.

    Args:
        source: the checkpoint.
        config: of the engine, the same on every rank.
        device: of this rank.
        ranks: that compute the model, or a stage of it, together.
        line: from the first of all ranks to the others; `None` with one.
        stages: of the model.
        place: of this rank in them; `None` is alone.

    Raises:
        InputError: a length beyond the model's context.
        UnsupportedError: the engine does not have the architecture; CUDA graphs are insisted on and not possible, or
            weights are to be offloaded from what is no GPU.
        CheckpointError: no whole checkpoint.
        ShapeError: the model cannot be placed so.
        KernelError: a kernel does not compile.
        TersorError: it does not fit in the device's memory, or what is offloaded not in the host's or on the disk.
    """
    context = DecoderConfig.from_dict(source.config).context
    if config.max_length is not None and config.max_length > context:
        raise InputError(f"max_length is {config.max_length}: the model's context is {context}")
    dtype = float_dtype_or_auto(config.dtype)
    offload = None
    if config.offload is not None:
        offload = offload_of(config, described(source)[0], dtype or usual_dtype(source, device), device)
    chip = kernel_chip(device)

    def kernels() -> list[KernelSource]:
        assert chip is not None
        return ahead.kernels(source, config, chip, place)

    with ahead.compiling(kernels, chip):
        decoder = load(
            source,
            device,
            dtype,
            activations=config.activations,
            context=config.max_length,
            ranks=ranks,
            offload=offload,
            place=place,
        )
    return ready(decoder, config, ranks, line, stages)


def ready(
    decoder: Decoder, config: EngineConfig, ranks: Ranks = ALONE, line: Line | None = None, stages: Stages = ONE
) -> Built:
    """Return a rank whose part of the weights is there, with its runner and pages; all ranks do so at once.

    Args:
        decoder: of the rank.
        config, ranks, line, stages: as for `build`.

    Raises:
        UnsupportedError, TersorError: as for `build`.
    """
    device = decoder.device
    context = min(config.max_length or decoder.config.context, decoder.config.context)
    rows = rows_of(config, decoder, stages.everyone if stages.count > 1 else ranks)
    runner = Runner(
        decoder,
        sampler_of(decoder, rows, context, ranks, stages),
        max_rows=rows,
        max_length=context,
        kv_dtype=config.pages_dtype,
        ranks=ranks,
        line=line,
        stages=stages,
    )
    if not runner.everyone.least(int(runner.costs is not None), device):
        runner.costs = None  # a step that reads pages together does so on all ranks
    graphs = captures(runner, config)
    return Built(runner, make_pages(runner, replace(config, cuda_graph=graphs)), context)


def sampler_of(decoder: Decoder, rows: int, context: int, ranks: Ranks, stages: Stages) -> Sampler | None:
    """Return what a rank has of the sampler: all where it draws, what tells another one on the first, else nothing.

    Args:
        decoder: of the rank.
        rows: of a step at most.
        context: tokens of a text at most.
        ranks, stages: as for `build`.
    """
    vocabulary = decoder.config.vocabulary
    if ranks.first and stages.last:
        return Sampler(rows + 1, vocabulary, decoder.device, most_length=context)
    if ranks.first and stages.first:
        return Teller(rows + 1, vocabulary, most_length=context)
    return None
