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
from tersor.formats import float_dtype_or_auto
from tersor.kernels.jit import KernelSource
from tersor.models import load
from tersor.models.load import described, usual_dtype
from tersor.ops.collective import ALONE, Ranks
from tersor.ops.dispatch import kernel_chip


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
    source: Source, config: EngineConfig, device: torch.device, ranks: Ranks = ALONE, line: Line | None = None
) -> Built:
    """Load a model, or a rank's part of it, compile its kernels meanwhile, and make its pages; all ranks do so at once.

    Args:
        source: the checkpoint.
        config: of the engine, the same on every rank.
        device: of this rank.
        ranks: that compute the model together.
        line: from the first rank to the others; `None` with one.

    Raises:
        UnsupportedError: the engine does not have the architecture; CUDA graphs are insisted on and not possible, or
            weights are to be offloaded from what is no GPU.
        CheckpointError: no whole checkpoint.
        ShapeError: the model cannot be cut for so many ranks.
        KernelError: a kernel does not compile.
        TersorError: it does not fit in the device's memory, or what is offloaded not in the host's or on the disk.
    """
    dtype = float_dtype_or_auto(config.dtype)
    offload = None
    if config.offload is not None:
        offload = offload_of(config, described(source)[0], dtype or usual_dtype(source, device), device)
    chip = kernel_chip(device)

    def kernels() -> list[KernelSource]:
        assert chip is not None
        return ahead.kernels(source, config, chip, ranks.rank)

    with ahead.compiling(kernels, chip):
        decoder = load(
            source,
            device,
            dtype,
            activations=config.activations,
            context=config.max_length,
            ranks=ranks,
            offload=offload,
        )
    context = min(config.max_length or decoder.config.context, decoder.config.context)
    sampler, rows = None, rows_of(config, decoder, ranks)
    if ranks.first:
        sampler = Sampler(rows + 1, decoder.config.vocabulary, device, most_length=context)
    kv_dtype = config.pages_dtype
    runner = Runner(decoder, sampler, max_rows=rows, max_length=context, kv_dtype=kv_dtype, ranks=ranks, line=line)
    graphs = captures(runner, config)
    return Built(runner, make_pages(runner, replace(config, cuda_graph=graphs)), context)
