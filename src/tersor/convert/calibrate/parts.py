"""What may transforms change in a block? Its parameters, and the tensors of the source that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tersor.checkpoint.conversion import Step
from tersor.checkpoint.header import WEIGHT_DTYPES
from tersor.convert.calibrate.tasks import Site, Task, read_tensor
from tersor.integrations.transformers.blocks import BlockModel
from tersor.integrations.transformers.norm_form import NormForm, norm_form


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter that one tensor of the source holds as it is.

    Attributes:
        number: of the step in the conversion.
        step: what becomes of the tensor.
    """

    number: int
    step: Step


class Parts:
    """The modules of one block, and where their parameters are stored."""

    def __init__(
        self,
        model: BlockModel,
        block: int,
        twin: nn.Module,
        steps: Sequence[tuple[int, Step, str]],
        tasks: Sequence[Task],
    ) -> None:
        """Look at a loaded block.

        Args:
            model: runs the block.
            block: its number.
            twin: the block that becomes the compressed one.
            steps: number, step and parameter of every tensor of the block.
            tasks: what is compressed of it.
        """
        self.model, self.block, self.twin = model, block, twin
        self._steps: dict[str, list[Stored]] = {}
        for number, step, parameter in steps:
            self._steps.setdefault(parameter, []).append(Stored(number, step))
        self.linears = {task.site: task for task in tasks if not task.site.part and self.stored(task.site.module)}

    def name(self, module: str) -> str:
        """Return a module's name in the model."""
        return self.model.name_of(self.block, module)

    def stored(self, module: str, own: str = "weight") -> Stored | None:
        """Return where a parameter of a module is stored; `None` where it is not one tensor of its shape."""
        found = self._steps.get(f"{self.name(module)}.{own}", [])
        parameter = self.twin.get_submodule(module)._parameters.get(own)
        if len(found) != 1 or parameter is None or found[0].step.source.spec.dtype not in WEIGHT_DTYPES:
            return None
        return found[0] if found[0].step.source.spec.shape == tuple(parameter.shape) else None

    def norms(self) -> Mapping[str, NormForm]:
        """Return the norms of the block whose parameters are stored as they are."""
        found = {}
        for module, own in self.twin.named_modules():
            held = [name for name, parameter in own._parameters.items() if parameter is not None]
            if held and not any(own.children()) and all(self.stored(module, name) for name in held):
                form = norm_form(own)
                if form is not None:
                    found[module] = form
        return found

    def read(self, module: str, own: str = "weight") -> torch.Tensor:
        """Return a parameter as it is stored, as float32 on the model's device."""
        stored = self.stored(module, own)
        assert stored is not None
        return read_tensor(stored.step).float().to(self.model.device)

    def put(self, module: str, own: str, value: torch.Tensor) -> nn.Parameter:
        """Give the twin a parameter of its own; return the one that it had."""
        held = self.twin.get_submodule(module)._parameters
        before = held[own]
        assert before is not None
        held[own] = nn.Parameter(value.to(before), requires_grad=False)
        return before

    def restore(self, module: str, own: str, parameter: nn.Parameter) -> None:
        """Give the twin back what `put` returned."""
        self.twin.get_submodule(module)._parameters[own] = parameter

    def task(self, site: Site) -> Task | None:
        """Return the linear layer at a site that is compressed and stored as one tensor; `None` of any other."""
        return self.linears.get(site)
