"""How many pages fit? What weights, a step and its graphs take is measured; pages get the rest."""

from __future__ import annotations

import torch

from tersor.engine.config import EngineConfig
from tersor.engine.runner import Runner
from tersor.errors import TersorError

CPU_BYTES = 1 << 30
"""Of all pages on a CPU, unless told."""
SCRATCH = 2
"""Pages while a step is measured."""


def make_pages(runner: Runner, config: EngineConfig) -> int:
    """Give a runner its pages and, where steps are to be CUDA graphs, capture them; return how many pages.

    Steps are captured twice: with a few pages, so that what graphs take is known before pages get the rest, and with
    all of them. Every rank of a model gets as many pages as the one with the least room for them.

    Raises:
        TersorError: what is left holds no text.
    """
    each = runner.page_bytes()
    graphs = runner.device.type == "cuda" and config.cuda_graph is not False
    if runner.device.type != "cuda":
        pages = (config.kv_bytes or CPU_BYTES) // each
    else:
        free = _free_bytes(runner, config, graphs)
        pages = (free if config.kv_bytes is None else min(config.kv_bytes, free)) // each
    pages = runner.ranks.least(pages, runner.device)
    if pages < SCRATCH:
        raise TersorError(
            f"{max(pages, 0)} pages of {each / 1e6:.1f} MB fit beside the weights: use fewer rows (max_rows), fewer "
            "tokens a step (max_step_tokens), or more of the memory (memory)"
        )
    runner.allocate(pages)
    if graphs:
        runner.capture()
    return pages


def _free_bytes(runner: Runner, config: EngineConfig, graphs: bool) -> int:
    """Return the bytes of a GPU that a step of the most tokens and graphs leave for pages."""
    device = runner.device
    torch.cuda.empty_cache()
    runner.allocate(SCRATCH)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.rehearse(config.max_step_tokens)
    torch.cuda.synchronize(device)
    step = torch.cuda.max_memory_allocated(device) - before
    if graphs:
        runner.capture()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    runner.allocate(SCRATCH)
    return int(config.memory * total) - (total - free) - step
