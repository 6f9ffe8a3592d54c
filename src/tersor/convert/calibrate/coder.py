"""What becomes of a weight once its layer's statistics are there? Codes by a recipe, or what another coder makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tersor.checkpoint.names import DENSE
from tersor.compress import Encoded, encode_blocks, get_recipe
from tersor.convert.calibrate.coded import CodedRows, code_mixed
from tersor.convert.calibrate.tasks import Task, decode
from tersor.formats import Assignment, Scheme
from tersor.ops import load_columns


@dataclass(slots=True)
class Coded:
    """What became of a task: tensors by their own names, the sums for its report, and its line of the log."""

    tensors: dict[str, torch.Tensor]
    squared_error: float
    squared_norm: float
    underflowed: list[int]
    line: dict[str, Any]


class Coder(Protocol):
    """Makes tensors of weights, and says what they stand for."""

    def prepare(self, tasks: Sequence[Task], device: torch.device) -> None:
        """Load what the work on tasks takes on a device.

        Raises:
            TersorError: a GPU cannot have its kernels.
        """

    def code(self, task: Task, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor], first: int) -> Coded:
        """Return what becomes of a weight [OC, IC], of experts in one tensor that of one.

        Args:
            task: whose weight it is.
            weight: on the device where the work is done.
            statistics: of its layer.
            first: number of its first row among those of all experts.

        Raises:
            NonFiniteError, FormatError: of its rows.
        """

    def decode(self, task: Task, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the weight that tensors stand for, in the source's shape; of experts with one axis more in front."""


class RecipeCoder:
    """Codes by a recipe of `compress.RECIPES`."""

    def __init__(self, recipe: str) -> None:
        self._recipe = recipe

    def prepare(self, tasks: Sequence[Task], device: torch.device) -> None:
        """Load the kernels that go over columns."""
        if get_recipe(self._recipe).all_rows:
            load_columns((scheme.format for task in tasks for scheme in _schemes(task)), device)

    def code(self, task: Task, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor], first: int) -> Coded:
        """Choose codes and pack them."""
        scheme = task.step.scheme
        assert scheme is not None
        taken: list[Encoded] = []
        if isinstance(scheme, Assignment):
            return _joined(code_mixed(weight, scheme, self._recipe, statistics))
        assert isinstance(scheme, Scheme), "recipes give codes to dense weights"
        encode_blocks(
            weight,
            scheme,
            lambda _, encoded: taken.append(encoded),
            self._recipe,
            statistics,
            first_row=first,
            block_elements=weight.numel(),
        )
        return _coded(taken[0], first)

    def decode(self, task: Task, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return what packed tensors stand for."""
        return decode(task.step, tensors, dtype)


def _schemes(task: Task) -> Sequence[Scheme]:
    """Return the schemes that rows of a task's weight may have."""
    form = task.step.scheme
    if isinstance(form, Assignment):
        return form.mix.levels
    assert isinstance(form, Scheme), "recipes give codes to dense weights"
    return [form]


def _coded(encoded: Encoded, first_row: int) -> Coded:
    tensors = {name: tensor.contiguous() for name, tensor in DENSE.pack(encoded).items()}
    underflowed = [first_row + row for row in encoded.underflowed]
    line: dict[str, Any] = {}
    if encoded.objective is not None:
        line = {"objective_before": encoded.objective.before, "objective_after": encoded.objective.after}
    return Coded(tensors, encoded.squared_error, encoded.squared_norm, underflowed, line)


def _joined(levels: Sequence[CodedRows]) -> Coded:
    """Put the rows of all levels of a weight together."""
    parts = [_coded(level.encoded, 0) for level in levels]
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
