"""Weights of a calibrated model become zero, and the others what loses least: the coder of `tersor prune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tersor.checkpoint.names import DENSE
from tersor.compress.prune import Pattern, prune
from tersor.convert.calibrate.coder import Coded
from tersor.convert.calibrate.tasks import Task, decode, matrices
from tersor.convert.calibrate.units import Units
from tersor.formats import Scheme

WEIGHT = "weight"
"""Name of a pruned weight that has no codes, in the dtype of its values."""


class PruneCoder:
    """Prunes weights, each with a pattern of its own, and gives those that stay codes where a scheme is asked for."""

    def __init__(
        self,
        patterns: Mapping[str, Pattern],
        algorithm: str,
        values: Scheme | torch.dtype | None,
        *,
        update: bool,
        units: Units | None = None,
    ) -> None:
        """Take what is asked for.

        Args:
            patterns: by the name of the layer.
            algorithm: a key of `compress.prune.ALGORITHMS`.
            values: scheme or dtype of the weights that stay; `None` is the dtype that they come in.
            update: whether those weights are fitted to their mask.
            units: what may not stay because it never fires.
        """
        self._units = units
        self._patterns, self._algorithm, self._values, self._update = patterns, algorithm, values, update

    def prepare(self, tasks: Sequence[Task], device: torch.device) -> None:
        """Load nothing: masks and the weights behind them are torch operations."""

    def code(self, task: Task, weight: torch.Tensor, statistics: Mapping[str, torch.Tensor], first: int) -> Coded:
        """Prune a weight and pack it."""
        scheme = self._values if isinstance(self._values, Scheme) else None
        pattern = self._patterns[task.name]
        allowed = self._units.allowed(task, weight) if self._units is not None else None
        given = weight if isinstance(self._values, Scheme | None) else weight.to(self._values)
        found = prune(given, pattern, self._algorithm, statistics, scheme=scheme, update=self._update, allowed=allowed)
        line: dict[str, Any] = {f"loss_{step}": loss for step, loss in found.losses.items()}
        line |= {"weights": weight.numel(), "kept": int(found.kept.sum())}
        if found.encoded is None:
            return Coded({WEIGHT: found.weight}, found.squared_error, found.squared_norm, [], line)
        tensors = {name: tensor.contiguous() for name, tensor in DENSE.pack(found.encoded).items()}
        underflowed = [first + row for row in found.encoded.underflowed]
        return Coded(tensors, found.squared_error, found.squared_norm, underflowed, line)

    def decode(self, task: Task, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return what a pruned weight's tensors stand for."""
        if WEIGHT in tensors:
            return matrices(task.step, tensors[WEIGHT]).to(dtype)
        return decode(task.step, tensors, dtype)
