"""Checkpoints that are there for a while: of random weights, compressed, with the tokenizer of the bundled model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

import tersor
from tersor.bench import random_checkpoint
from tersor.checkpoint.source import read_config
from tersor.hardware import resolve_device
from tersor.models import DecoderConfig, geometries
from tersor.models.names import NAMES

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny-lm"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
CONTEXT = 4096


def written(geometry: str, format: str, folder: Path) -> Path:
    """Write a checkpoint of random weights, compress it, and return where it is."""
    plain, packed = folder / "plain", folder / "packed"
    plain.mkdir()
    own = read_config(Path(geometry)) if Path(geometry).is_dir() else geometries.config_json(geometry)
    device = resolve_device()
    random_checkpoint.write(own, CONTEXT, plain, torch.float16, device)
    for name in TOKENIZER:
        shutil.copy(EXAMPLE / name, plain / name)
    config = DecoderConfig.from_dict(own)
    overrides = {} if config.tied else {NAMES[config.architecture].head: format}
    tersor.quantize(plain, packed, format=format, overrides=overrides, device=device.type)
    shutil.rmtree(plain)
    return packed
