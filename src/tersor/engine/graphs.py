"""Are steps that only decode CUDA graphs? Where that is possible, unless nobody wants them."""

from __future__ import annotations

import torch

from tersor import ops
from tersor.engine.config import EngineConfig
from tersor.engine.runner import Runner
from tersor.errors import UnsupportedError


def captures(runner: Runner, config: EngineConfig) -> bool:
    """Tell whether a runner's steps are to be CUDA graphs, on every rank alike; where not, it keeps the reason.

    So it does where they are repeated, and nothing but the graph is missing (`Runner.repeats`).

    Raises:
        UnsupportedError: they are insisted on and not possible.
    """
    why = "not asked for" if config.cuda_graph is False else _waits(runner)
    everywhere = runner.ranks.least(int(not why), runner.device)
    if everywhere and not runner.repeats:
        return True
    runner.eager_reason = why or "another rank waits for its device in a step"
    if everywhere:
        runner.eager_reason = "the host reads weights from a disk in every step"
    if config.cuda_graph:
        raise UnsupportedError(f"no CUDA graph for this model: {runner.eager_reason}")
    return bool(everywhere)


def _waits(runner: Runner) -> str:
    """Return why the host waits for the device inside of a step, or an empty string."""
    decoder = runner.decoder
    if runner.device.type != "cuda":
        return f"the model is on {runner.device.type}"
    for layer, cache in zip(decoder.layers, decoder.caches(1, runner.kv_dtype), strict=True):
        attention = layer.attention
        norms, sinks = getattr(attention, "norms", None), getattr(attention, "sinks", None)
        qkv = torch.empty(1, attention.form.qkv_channels, dtype=decoder.dtype, device=runner.device)
        why = ops.attention_obstacle(qkv, cache, attention.form, attention.rotary, norms, sinks)
        if why:
            return why
    return decoder.waits
