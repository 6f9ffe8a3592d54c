"""Mixed weights made row set by row set, and their levels."""

from __future__ import annotations

import torch

from tersor.compress import encode
from tersor.formats import Assignment, Mix, Scheme, get_scheme
from tersor.layouts import MixedWeight, PackedWeight

MIX = Mix((get_scheme("uint3", 32), get_scheme("fp5_e2m2"), get_scheme("int8", 64)))
IC = 192


def matrix(rows: int, seed: int = 0) -> torch.Tensor:
    """Return a random weight, float32 [rows, IC]."""
    return torch.randn(rows, IC, generator=torch.Generator().manual_seed(seed))


def levels(rows: int, seed: int = 0, levels: int = 3) -> Assignment:
    """Return random levels of so many output features."""
    drawn = torch.randint(levels, (rows,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Assignment(MIX, bytes(drawn.tolist()))


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
