"""How many layers stay on the GPU where weights are offloaded? What a step and pages take is known beforehand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from tersor import settings
from tersor.engine.config import MANY_ROWS, EngineConfig
from tersor.errors import UnsupportedError
from tersor.models.config import DecoderConfig
from tersor.models.streamed import Offload
from tersor.offload.choice import Room

_log = logging.getLogger("tersor")
_GRAPHS = 1 << 30
"""Bytes that graphs, libraries and pieces of memory that are not whole take; what is not taken, pages get."""
FOLDER = "offload"
"""In the cache directory: where files of images are made."""


def offload_of(config: EngineConfig, model: DecoderConfig, dtype: torch.dtype, device: torch.device) -> Offload | None:
    """Return how an engine's weights leave the GPU, or `None` where they do not.

    Args:
        config: of the engine.
        model: which decoder it is.
        dtype: of activations.
        device: that computes.

    Raises:
        UnsupportedError: that is no GPU.
    """
    if config.offload is None:
        return None
    if device.type != "cuda":
        raise UnsupportedError(f"offload is {config.offload}, and the model is on {device.type}: it is for a GPU")

    def choose(layers: Sequence[int], outside: int) -> int:
        if config.resident_layers is not None:
            return config.resident_layers
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        room = int(config.memory * total) - (total - free)
        return Room(room, step_bytes(config, model, dtype) + _GRAPHS, config.kv_bytes).resident(layers, outside)

    return Offload(choose, directory_of(config), _log.warning)  # seen where nobody listens, too: it decides the speed


def directory_of(config: EngineConfig) -> Path | None:
    """Return where the file of images is to be, or `None` where they are in memory of the host."""
    if config.offload != "disk":
        return None
    if config.offload_directory is not None:
        return Path(config.offload_directory).expanduser()
    cache: Path = settings.get("TERSOR_CACHE_DIR")
    return cache / FOLDER


def step_bytes(config: EngineConfig, model: DecoderConfig, dtype: torch.dtype) -> int:
    """Return about what the largest step takes beside weights and pages: rows between layers and of the widest
    feed-forward network, and logits of every row."""
    tokens, rows = config.max_step_tokens, config.max_rows or min(MANY_ROWS, config.max_step_tokens)
    widest = 0
    for layer in model.layers:
        experts = layer.experts
        inner = model.ffn if experts is None else experts.ffn * experts.top_k
        widest = max(widest, 3 * inner + layer.attention.qkv_channels)
    between = 8 * model.hidden
    return tokens * (between + widest) * dtype.itemsize + rows * model.vocabulary * (4 + dtype.itemsize)
