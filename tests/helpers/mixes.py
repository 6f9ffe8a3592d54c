"""Mixed weights made row set by row set, and their levels."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from helpers import checkpoints, packed_models
from tersor.checkpoint.names import stored_weights
from tersor.compress import encode
from tersor.convert import quantize
from tersor.convert.mix import mixable
from tersor.convert.shared import part_name
from tersor.formats import Assignment, Mix, Scheme, get_scheme
from tersor.integrations.transformers.architecture import read_architecture
from tersor.layouts import MixedWeight, PackedWeight

MIX = Mix((get_scheme("uint3", 32), get_scheme("fp5_e2m2"), get_scheme("int8", 64)))
IC = 192


def matrix(rows: int, seed: int = 0) -> torch.Tensor:
    """Return a random weight, float32 [rows, IC]."""
    return torch.randn(rows, IC, generator=torch.Generator().manual_seed(seed))


def levels(rows: int, seed: int = 0, mix: Mix = MIX) -> Assignment:
    """Return random levels of so many output features."""
    drawn = torch.randint(len(mix.levels), (rows,), generator=torch.Generator().manual_seed(seed))
    return Assignment(mix, bytes(drawn.tolist()))


def pack(weight: torch.Tensor, scheme: Scheme) -> PackedWeight:
    """Return a weight in one scheme."""
    return PackedWeight.from_encoded(encode(weight, scheme))


def mixed(weight: torch.Tensor, assignment: Assignment) -> MixedWeight:
    """Return a weight with every row at its level."""
    level = torch.tensor(list(assignment.level))
    sets = [
        pack(weight[level == number], scheme)
        for number, scheme in enumerate(assignment.mix.levels)
        if assignment.rows[number]
    ]
    return MixedWeight.of(assignment, sets)


SMALL = Mix((get_scheme("uint3", 32), get_scheme("fp5_e2m2"), get_scheme("int8")))
"""Levels that fit the small models of `helpers.checkpoints`."""


def compressed(
    kind: str, directory: Path, ignore: Sequence[str] = (), mix: Mix = SMALL, **config: Any
) -> tuple[Path, Path, dict[str, Assignment]]:
    """Save a small model and a mix of it by random levels; return both directories and the levels of every module.

    Gate and up of a channel have one level.
    """
    source = packed_models.plain(kind, directory / "model", **config)
    found = mixable(source, ignore=ignore)
    assignments = {
        name: levels(rows, zlib.crc32(name.replace("up_proj", "gate_proj").encode()), mix=mix)
        for name, (rows, _) in found.scored.items()
        if name not in found.experts
    }
    for name, shared in found.experts.items():
        drawn = levels(shared.channels, zlib.crc32(name.encode()), mix=mix)
        chosen = {part_name(name, 0): np.frombuffer(drawn.level, dtype=np.uint8)}
        spread = shared.spread(name, chosen)
        assignments |= {module: Assignment(mix, level.tobytes()) for module, level in spread.items()}
    quantize(source, directory / "mixed", assignments=assignments, ignore=ignore)
    return source, directory / "mixed", assignments


def decoded(source: Path, mixed: Path, directory: Path) -> Path:
    """Save a plain model of what the weights of a mixed one stand for, and return its directory.

    Rows are encoded from the source, each at its level, so that nothing is read of a mix but the levels.
    """
    tensors, stored = checkpoints.weights(source), checkpoints.weights(mixed)
    for stem in stored_weights(stored):
        name = stem if stem in tensors else f"{stem}.weight"
        level = stored[f"{stem}.weight_level"]
        turned = tensors[name].shape[-2] != len(level)
        weight = tensors[name].transpose(-1, -2) if turned else tensors[name]
        made = torch.empty(weight.shape)
        for number, scheme in enumerate(SMALL.levels):
            rows = weight[..., level == number, :]
            made[..., level == number, :] = encode(rows.flatten(0, -2).float(), scheme).dequantize().view(rows.shape)
        tensors[name] = (made.transpose(-1, -2) if turned else made).contiguous()
    shutil.copytree(source, directory)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def plain_weights(source: Path, assignments: Mapping[str, Assignment]) -> dict[str, torch.Tensor]:
    """Return what the weights [OC, IC] of a model decode to, each row encoded alone, by name of the module."""
    tensors, linears = checkpoints.weights(source), read_architecture(source).linears
    found = {}
    for name, assignment in assignments.items():
        weight = tensors[f"{name}.weight"]
        weight = weight.T if linears[name].transposed else weight
        rows = [
            encode(row[None].float(), assignment.mix.levels[level]).dequantize()
            for row, level in zip(weight, assignment.level, strict=True)
        ]
        found[name] = torch.cat(rows)
    return found
