"""What do the zeros of each matrix cost? One backward pass, of which the squares of inputs and gradients are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tersor.compress.prune.allocate import cost_counts
from tersor.convert.calibrate.gradients import Backward
from tersor.convert.calibrate.scores import BlockScores
from tersor.convert.calibrate.tasks import Task, matrices, read_tensor
from tersor.errors import InputError


class Sensitivity(BlockScores):
    """How many weights of each linear layer cost how much, as `compress.prune.allocate.cost_counts` has it."""

    def score(self, block: int, tasks: Sequence[Task], run: Backward) -> dict[str, torch.Tensor]:
        """Return the counts of a block's layers."""
        squares = {task.site: _Squares() for task in tasks}
        run({site: own.add for site, own in squares.items()}, replace=True)
        found = {}
        for task in tasks:
            own = squares[task.site]
            if own.inputs is None or own.outputs is None:
                raise InputError(f"{task.name} is not reached by this text: leave --allocate out")
            if not bool(own.inputs.isfinite().all() and own.outputs.isfinite().all()):
                raise InputError(f"what {task.name} costs holds a NaN or an infinity on this text")
            weight = matrices(task.step, read_tensor(task.step)).to(own.inputs.device, torch.float32)
            found[task.name] = cost_counts(weight, own.inputs / own.tokens, own.outputs / own.tokens)
        return found


class _Squares:
    """Sums over tokens of the squares of a layer's inputs and of the gradients of its outputs."""

    def __init__(self) -> None:
        self.tokens = 0
        self.inputs: torch.Tensor | None = None
        self.outputs: torch.Tensor | None = None

    def add(self, given: list[torch.Tensor], gradient: torch.Tensor) -> None:
        x = given[0].flatten(0, -2)
        inputs, outputs = (part.double().square().sum(dim=0) for part in (x, gradient.flatten(0, -2)))
        self.inputs = inputs if self.inputs is None else self.inputs + inputs
        self.outputs = outputs if self.outputs is None else self.outputs + outputs
        self.tokens += len(x)
