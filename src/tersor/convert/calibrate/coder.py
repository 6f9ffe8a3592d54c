"""What becomes of a weight once its layer's statistics are there? Codes by a recipe, or what another coder makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from tersor.compress import Encoded, encode_blocks, get_recipe
from tersor.convert.calibrate.coded import Coded, code_mixed, coded, joined
from tersor.convert.calibrate.tasks import Task, decode
from tersor.formats import Assignment, Scheme
from tersor.ops import load_columns


class Coder(Protocol):
    """Makes tensors of weights, and says what they stand for.

    Attributes:
        recipe: a key of `compress.RECIPES`: whose statistics are summed up, and by whose codes transforms are judged.
    """

    recipe: str

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
        self.recipe = recipe

    def prepare(self, tasks: Sequence[Task], device: torch.device) -> None:
        """Load the kernels that go over columns."""
        if get_recipe(self.recipe).all_rows:
            load_columns((scheme.format for task in tasks for scheme in _schemes(task)), device)

    def code(self, task: Task, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor], first: int) -> Coded:
        """Choose codes and pack them."""
        scheme = task.step.scheme
        assert scheme is not None
        taken: list[Encoded] = []
        if isinstance(scheme, Assignment):
            return joined(code_mixed(weight, scheme, self.recipe, statistics))
        assert isinstance(scheme, Scheme), "recipes give codes to dense weights"
        encode_blocks(
            weight,
            scheme,
            lambda _, encoded: taken.append(encoded),
            self.recipe,
            statistics,
            first_row=first,
            block_elements=weight.numel(),
        )
        return coded(taken[0], first)

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
