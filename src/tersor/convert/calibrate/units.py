"""Which units of an MLP never fire on a text? Those whose activation ahead of the down projection stays at zero.

A unit is an input channel of the layer that writes the MLP's output back, with the rows of the layers that make it. One
that is dropped becomes zero in all of them: the model keeps its shape, which config.json has one number for, whatever
the count in each layer, and a sparse weight stores nothing of it but its bits of the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tersor.convert.calibrate.inputs import watched
from tersor.convert.calibrate.streams import Streams
from tersor.convert.calibrate.tasks import Task
from tersor.integrations.transformers.blocks import BlockModel

SILENT = 1e-4
"""A unit never fires whose largest activation is below this times the root mean square of all units of its layer."""

_MAKERS: Mapping[str, tuple[str, ...]] = {
    "down_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "w2": ("w1", "w3"),
    "fc2": ("fc1",),
    "fc_out": ("fc_in",),
    "c_proj": ("c_fc",),
    "dense_4h_to_h": ("dense_h_to_4h",),
}
"""Name of the layer that writes an MLP's output -> those beside it whose rows make its input."""


class Units:
    """The units that never fire, block by block.

    Attributes:
        drop: whether they become zero.
    """

    def __init__(self, *, drop: bool) -> None:
        self.drop = drop
        self._allowed: dict[int, torch.Tensor] = {}

    def allowed(self, task: Task, weight: torch.Tensor) -> torch.Tensor | None:
        """Return which weights of the block at hand may stay, bool [OC, IC]; `None` where all may."""
        found = self._allowed.get(task.index)
        return None if found is None else found.to(weight.device).expand(weight.shape)

    @torch.no_grad()
    def measure(
        self, model: BlockModel, layer: nn.Module, streams: Streams, block: int, tasks: Sequence[Task]
    ) -> dict[str, list[int]]:
        """Run the original block and return the units that never fire, by the name of the layer that they go into.

        Args:
            model: runs the block.
            layer: the original block.
            streams: at its entry.
            block: its number.
            tasks: its layers that are pruned.
        """
        self._allowed.clear()
        made = {task.index: (task, makers) for task in tasks if (makers := _makers(task, tasks))}
        peaks: dict[str, torch.Tensor] = {}
        squares: dict[str, float] = {}
        tokens: dict[str, int] = {}

        def take(module: str, tensors: list[torch.Tensor]) -> None:
            x = tensors[0].detach().flatten(0, -2).float()
            peak = x.abs().amax(dim=0)
            peaks[module] = torch.maximum(peaks[module], peak) if module in peaks else peak
            squares[module] = squares.get(module, 0.0) + float(x.double().square().mean(dim=1).sum())
            tokens[module] = tokens.get(module, 0) + len(x)

        modules = {task.site.module for task, _ in made.values()}
        if modules:
            with watched(layer, modules, take):
                for hidden, _, call in streams.each(block):
                    model.run(layer, hidden, call)
        found: dict[str, list[int]] = {}
        for task, makers in made.values():
            module = task.site.module
            if module not in peaks:
                continue
            silent = peaks[module] <= SILENT * (squares[module] / tokens[module]) ** 0.5
            found[task.name] = silent.nonzero().flatten().tolist()
            if self.drop and found[task.name]:
                self._allowed[task.index] = ~silent.unsqueeze(0)
                for maker in makers:
                    rows = _features(maker)
                    self._allowed[maker.index] = ~silent.repeat(rows // task.channels).unsqueeze(1)
        return found


def _makers(task: Task, tasks: Sequence[Task]) -> list[Task]:
    """Return the layers whose output features are the input channels of a task's, once or, in one piece, twice."""
    owner, _, leaf = task.site.module.rpartition(".")
    if task.site.part or leaf not in _MAKERS:
        return []
    names = {f"{owner}.{name}" if owner else name for name in _MAKERS[leaf]}
    beside = [other for other in tasks if not other.site.part and other.site.module in names]
    return [other for other in beside if _features(other) in (task.channels, 2 * task.channels)]


def _features(task: Task) -> int:
    assert task.step.layer is not None
    return task.step.layer.shape[-2]
