"""How many pages fit? What weights, a step and its graphs take is measured; pages get the rest."""

from __future__ import annotations

import torch

from tersor.engine.config import MANY_ROWS, EngineConfig
from tersor.engine.runner import Runner
from tersor.errors import TersorError
from tersor.models import Decoder
from tersor.ops.collective import ALONE, Ranks

CPU_BYTES = 1 << 30
"""Of all pages on a CPU, unless told."""
SCRATCH = 2
"""Pages while a step is measured."""
LEAST_ROWS = 256
"""Rows of a step, however much of the memory they take, unless told."""
_SHARE_OF_ROWS = 0.05
"""Of the memory that weights leave, what rows may take before they become fewer."""
_MEASURED = 2
"""Graphs behind the largest whose memory says what each further one takes: all use that of the largest again."""
_UNIT = 2 << 20
"""Bytes of a piece of the GPU's memory: less is not taken, nor seen."""


def rows_of(config: EngineConfig, decoder: Decoder, ranks: Ranks = ALONE) -> int:
    """Return how many rows a step has at most, on every rank as many: those asked for, or `MANY_ROWS`.

    They are halved, down to `LEAST_ROWS`, while what they take is more than a twentieth of the memory that weights
    leave: pages are worth more there. No step has more rows than tokens.

    Args:
        config: of the engine.
        decoder: the model, in memory.
        ranks: that compute it together.
    """
    if config.max_rows is not None:
        return config.max_rows
    device = decoder.device
    room = (config.kv_bytes or CPU_BYTES) if device.type != "cuda" else _left(device, config)
    rows = MANY_ROWS
    while rows > LEAST_ROWS and rows * row_bytes(decoder) > _SHARE_OF_ROWS * room:
        rows //= 2
    return ranks.least(min(rows, config.max_step_tokens), device)


def row_bytes(decoder: Decoder) -> int:
    """Return the bytes that one more row of a step takes beside those of its tokens and pages: logits in the dtype of
    activations, twice where they are capped, and a bit for every token that a grammar allows."""
    model = decoder.config
    return model.vocabulary * decoder.dtype.itemsize * (1 if model.softcap is None else 2) + -(-model.vocabulary // 8)


def make_pages(runner: Runner, config: EngineConfig) -> int:
    """Give a runner its pages and, where steps are to be CUDA graphs, capture them; return how many pages.

    A few graphs are captured with a few pages, so that what all take is known before pages get the rest; then all are,
    with all pages. Should they take more than that, pages are fewer, and graphs captured anew. Every rank of a model
    gets as many pages as the one with the least room for them.

    Raises:
        TersorError: what is left holds no text.
    """
    device, each = runner.device, runner.page_bytes()
    graphs, step = device.type == "cuda" and config.cuda_graph is not False, 0
    if device.type != "cuda":
        pages = (config.kv_bytes or CPU_BYTES) // each
    else:
        free, step = _room(runner, config, graphs)
        pages = (free if config.kv_bytes is None else min(config.kv_bytes, free)) // each
    pages = runner.everyone.least(pages, device)
    while True:
        if pages < SCRATCH:
            raise TersorError(
                f"{max(pages, 0)} pages of {each / 1e6:.1f} MB fit beside the weights: use fewer rows (max_rows), "
                "fewer tokens a step (max_step_tokens), or more of the memory (memory)"
            )
        runner.allocate(pages)
        if not graphs:
            return pages
        runner.capture()
        left = _left(device, config) - step
        fewer = runner.everyone.least(pages + min(left // each, 0), device)
        if fewer == pages:
            return pages
        pages = fewer


def _room(runner: Runner, config: EngineConfig, graphs: bool) -> tuple[int, int]:
    """Return the bytes of a GPU that a step of the most tokens and graphs leave for pages, and those of the step."""
    device = runner.device
    torch.cuda.empty_cache()
    runner.allocate(SCRATCH)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.rehearse(config.max_step_tokens)
    torch.cuda.synchronize(device)
    step = torch.cuda.max_memory_allocated(device) - before + runner.passed_bytes(config.max_step_tokens)
    room, sizes = 0, runner.sizes() if graphs else []
    if sizes:
        runner.capture(sizes[:1])
        largest, few = _left(device, config), sizes[1 : 1 + _MEASURED]
        if few:
            runner.capture(few)
            taken = max(largest - _left(device, config), _UNIT * len(few))
            room = -taken * (len(sizes) - 1 - len(few)) // len(few)
    room += _left(device, config) - step
    room -= _UNIT * sum(1 if one.scales is None else 2 for one in runner.caches)  # each tensor of pages is whole pieces
    runner.allocate(SCRATCH)
    return room, step


def _left(device: torch.device, config: EngineConfig) -> int:
    """Return the bytes that an engine may still take of a GPU."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(config.memory * total) - (total - free)
