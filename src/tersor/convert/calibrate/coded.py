"""The codes of one weight, packed, with what the log says of them; of output features with different schemes, too.

The rows of each level get their codes by the recipe, apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tersor.checkpoint.names import DENSE, LEVELS, PACKED, SCALE, ZERO_POINT, level_stem
from tersor.compress import Encoded, encode_blocks
from tersor.compress.statistics import OUTPUT_HESSIAN
from tersor.errors import NonFiniteError
from tersor.formats import Assignment, ScaleError, Scheme
from tersor.layouts import MixedWeight, PackedWeight


@dataclass(slots=True)
class Coded:
    """What became of a task: packed tensors, the sums for its report, and its line of the log."""

    tensors: dict[str, torch.Tensor]
    squared_error: float
    squared_norm: float
    underflowed: list[int]
    line: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CodedRows:
    """The rows of one level.

    Attributes:
        tensors: by their names beside the weight's others, such as `levels.0.weight_packed`.
        encoded: their codes.
        features: the output feature of each row.
    """

    tensors: dict[str, torch.Tensor]
    encoded: Encoded
    features: list[int]


def code_mixed(
    weight: torch.Tensor, assignment: Assignment, recipe: str, statistics: Mapping[str, torch.Tensor]
) -> list[CodedRows]:
    """Choose codes for the rows of every level that a weight has, and pack them.

    Args:
        weight: [OC, IC], on the device where it is done.
        assignment: the level of every output feature.
        recipe: a key of `compress.RECIPES`.
        statistics: of the layer; the second moments of output gradients are cut to the rows of a level.

    Raises:
        NonFiniteError, ScaleError: with the row in the whole weight.
    """
    level = torch.tensor(list(assignment.level), device=weight.device)
    found = []
    for number, scheme in enumerate(assignment.mix.levels):
        rows = (level == number).nonzero().flatten()
        if not len(rows):
            continue
        features = rows.tolist()
        own = dict(statistics)
        if OUTPUT_HESSIAN in own:
            own[OUTPUT_HESSIAN] = _of_rows(own[OUTPUT_HESSIAN], rows)
        try:
            encoded = _encode(weight[rows], scheme, recipe, own)
        except NonFiniteError as error:
            raise NonFiniteError((features[error.index[0]], error.index[1]), error.value) from None
        except ScaleError as error:
            raise ScaleError(features[error.row], error.reason) from None
        packed = DENSE.pack(encoded)
        tensors = {f"{level_stem(number)}.{name}": tensor.contiguous() for name, tensor in packed.items()}
        found.append(CodedRows(tensors, encoded, features))
    return found


def decode_mixed(assignment: Assignment, channels: int, tensors: Mapping[str, torch.Tensor]) -> MixedWeight:
    """Return the weight that packed tensors of levels are.

    Args:
        assignment: the level of every output feature.
        channels: IC.
        tensors: as `CodedRows.tensors`, of all levels.
    """
    sets = []
    for number, (scheme, rows) in enumerate(zip(assignment.mix.levels, assignment.rows, strict=True)):
        if rows:
            stem = f"{LEVELS}.{number}"
            data, scale = tensors[f"{stem}.{PACKED}"], tensors[f"{stem}.{SCALE}"]
            sets.append(PackedWeight(scheme, (rows, channels), data, scale, tensors.get(f"{stem}.{ZERO_POINT}")))
    return MixedWeight.of(assignment, sets)


def _encode(weight: torch.Tensor, scheme: Scheme, recipe: str, statistics: Mapping[str, torch.Tensor]) -> Encoded:
    """Return the codes of all rows in one block, with the recipe's objective."""
    taken: list[Encoded] = []
    encode_blocks(weight, scheme, lambda _, one: taken.append(one), recipe, statistics, block_elements=weight.numel())
    return taken[0]


def _of_rows(hessian: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return rows and columns of second moments [OC, OC], or of their blocks [P, OC / P, OC / P]: [rows, rows]."""
    if hessian.dim() == 2:
        return hessian[rows][:, rows]
    size = hessian.shape[1]
    parts = []
    for part, block in enumerate(hessian):
        own = rows[(rows >= part * size) & (rows < (part + 1) * size)] - part * size
        parts.append(block[own][:, own])
    return torch.block_diag(*parts)


def coded(encoded: Encoded, first_row: int) -> Coded:
    """Pack the codes of a weight, or of one expert whose first row is `first_row` of the rows of all."""
    tensors = {name: tensor.contiguous() for name, tensor in DENSE.pack(encoded).items()}
    underflowed = [first_row + row for row in encoded.underflowed]
    line: dict[str, Any] = {}
    if encoded.objective is not None:
        line = {"objective_before": encoded.objective.before, "objective_after": encoded.objective.after}
    return Coded(tensors, encoded.squared_error, encoded.squared_norm, underflowed, line)


def joined(levels: Sequence[CodedRows]) -> Coded:
    """Put the rows of all levels of a weight together."""
    parts = [coded(level.encoded, 0) for level in levels]
    return Coded(
        {name: tensor for level in levels for name, tensor in level.tensors.items()},
        sum(part.squared_error for part in parts),
        sum(part.squared_norm for part in parts),
        [level.features[row] for level, part in zip(levels, parts, strict=True) for row in part.underflowed],
        {key: sum(part.line[key] for part in parts) for key in parts[0].line},
    )


def stacked(parts: Sequence[Coded]) -> Coded:
    """Put the weights of all experts of a layer together."""
    lines = [part.line for part in parts]
    return Coded(
        {name: torch.stack([part.tensors[name] for part in parts]) for name in parts[0].tensors},
        sum(part.squared_error for part in parts),
        sum(part.squared_norm for part in parts),
        [row for part in parts for row in part.underflowed],
        {key: sum(line[key] for line in lines) for key in lines[0]},
    )
