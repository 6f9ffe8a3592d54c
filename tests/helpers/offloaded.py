"""Small checkpoints of every kind of weight, with layers enough that some stream, and decoders of which some do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from helpers import mixes, packed_models, pruned
from tersor import models
from tersor.convert import quantize
from tersor.models import Decoder
from tersor.models.streamed import Offload

LAYERS = 5
SIZES = {"max_position_embeddings": 256, "num_hidden_layers": LAYERS}


def _packed(kind: str, **options: object) -> Callable[[Path], Path]:
    return lambda folder: packed_models.case(kind, folder, options, **SIZES).packed


def _sparse(folder: Path) -> Path:
    quantize(pruned.saved("llama", folder / "plain", 0.4, **SIZES), folder / "packed", format="fp6_e3m2")
    return folder / "packed"


KINDS: dict[str, Callable[[Path], Path]] = {
    "plain": lambda folder: packed_models.plain("llama", folder / "plain", **SIZES),
    "fp6": _packed("llama", format="fp6_e3m2"),
    "uint4": _packed("qwen2", format="uint4", group_size=32),
    "mixed": lambda folder: mixes.compressed("llama", folder, **SIZES)[1],
    "sparse": _sparse,
    "experts": _packed("qwen3_moe", format="fp6_e3m2"),
    "plain experts": lambda folder: packed_models.plain("mixtral", folder / "plain", **SIZES),
    "mixed experts": lambda folder: mixes.compressed("mixtral", folder, **SIZES)[1],
    "latent": _packed("deepseek_v3", format="fp6_e3m2"),
    "learned positions": _packed("opt", format="int8"),
}
"""Name -> what makes the checkpoint in a folder."""


def loaded(
    path: Path, resident: int, directory: Path | None = None, told: Callable[[str], None] | None = None
) -> Decoder:
    """Return a decoder on the CPU of which so many layers stay; the others are in memory, or in a file."""
    return models.load(path, "cpu", torch.float32, offload=Offload(lambda layers, outside: resident, directory, told))
