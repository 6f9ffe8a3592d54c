"""How many pages are there? As many as told, or as fit: what weights, a step and its graphs take is measured."""

from __future__ import annotations

import torch

from tersor import ops
from tersor.engine.config import EngineConfig
from tersor.engine.runner import Runner
from tersor.errors import TersorError, UnsupportedError
from tersor.models import DecoderConfig
from tersor.ops.attention_form import PagedCache

CPU_BYTES = 1 << 30
"""Of all pages on a CPU, unless told."""
SCRATCH = 2
"""Pages while a step is measured."""


def make_pages(runner: Runner, config: EngineConfig) -> int:
    """Give a runner its pages and, where steps are to be CUDA graphs, capture them; return how many pages.

    Where pages get what is left, steps are captured twice: with a few pages, so that what graphs take is known before
    pages get the rest, and with all of them. Every rank of a model gets as many pages as the one with the least room
    for them.

    Raises:
        UnsupportedError: steps are to be CUDA graphs and cannot be.
        TersorError: what is left holds no text, or pages of so many bytes do not fit.
    """
    each, on_gpu = runner.page_bytes(), runner.device.type == "cuda"
    runner.allocate(SCRATCH)
    graphs = _captures(runner, config)
    if config.kv_bytes is not None:
        pages = config.kv_bytes // each
    else:
        pages = (_free_bytes(runner, config, graphs) if on_gpu else CPU_BYTES) // each
    pages = runner.ranks.least(pages, runner.device)
    if pages < SCRATCH:
        raise TersorError(
            f"{max(pages, 0)} pages of {each / 1e6:.1f} MB fit beside the weights: use fewer rows (max_rows), fewer "
            "tokens a step (max_step_tokens), or more of the memory (memory)"
        )
    try:
        runner.allocate(pages)
        if on_gpu and config.kv_bytes is not None:
            runner.rehearse(config.max_step_tokens)
        if graphs:
            runner.capture()
    except torch.OutOfMemoryError:
        raise TersorError(
            f"keys and values of {pages * each / 1e6:.1f} MB and a step of {config.max_step_tokens} tokens do not fit "
            f"in the memory of {runner.device} beside the weights: use shorter texts, or fewer at once"
        ) from None
    return pages


def page_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Return bytes of a page, of all layers of a whole model together, with keys and values in `dtype`."""
    caches = (PagedCache.empty(1, layer.attention, dtype, "meta") for layer in config.layers)
    return sum(one.pages.nbytes + (0 if one.scales is None else one.scales.nbytes) for one in caches)


def _captures(runner: Runner, config: EngineConfig) -> bool:
    """Tell whether steps are to be CUDA graphs, on every rank alike, and keep the reason where they are not.

    Raises:
        UnsupportedError: they are to be and cannot be.
    """
    why = "not asked for" if config.cuda_graph is False else _waits(runner)
    if runner.ranks.least(int(not why), runner.device) and not why:
        return True
    runner.eager_reason = why or "another rank waits for its device in a step"
    if config.cuda_graph:
        raise UnsupportedError(f"no CUDA graph for this model: {runner.eager_reason}")
    return False


def _waits(runner: Runner) -> str:
    """Return why the host waits for the device inside of a step, or an empty string."""
    decoder = runner.decoder
    if runner.device.type != "cuda":
        return f"the model is on {runner.device.type}"
    for layer, cache in zip(decoder.layers, runner.caches, strict=True):
        attention = layer.attention
        form, norms, sinks = attention.form, getattr(attention, "norms", None), getattr(attention, "sinks", None)
        qkv = torch.empty(1, form.qkv_channels, dtype=decoder.dtype, device=runner.device)
        why = ops.attention_obstacle(qkv, cache, form, attention.rotary, norms, sinks)
        if why:
            return why
    return decoder.waits


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
