"""Which weights are calibrated, and where in the model does each read its input?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tersor.checkpoint.conversion import Conversion, Step
from tersor.checkpoint.modules import Target
from tersor.checkpoint.names import MASK, OUTLIERS, PACKED, SCALE, TORCH_DTYPES, VALUES, ZERO_POINT
from tersor.checkpoint.released import DecodedTensor
from tersor.convert.calibrate.coded import decode_mixed
from tersor.formats import Assignment, Pruned
from tersor.integrations.transformers.blocks import BlockModel
from tersor.layouts import PackedWeight, SparseWeight


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a block where layers read their input.

    Attributes:
        module: name in the block: of a linear layer, or of what holds the experts of a layer.
        part: of experts, `in` or `down`: what reads the hidden state, or what writes it back; of linear layers empty.
    """

    module: str
    part: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor of the source that is to be calibrated.

    Attributes:
        index: number of its step in the conversion.
        step: what becomes of it.
        block: number of the block that it is in.
        site: where its layer reads.
        parameter: the model's parameter that the tensor becomes, or becomes a part of.
        expert: number of the expert whose weight it is, `None` for a linear layer and for the experts of a layer in one
            tensor.
    """

    index: int
    step: Step
    block: int
    site: Site
    parameter: str
    expert: int | None = None

    @property
    def name(self) -> str:
        """Name of the layer, as patterns find it."""
        assert self.step.layer is not None
        return self.step.layer.module

    @property
    def channels(self) -> int:
        """IC of the layer."""
        assert self.step.layer is not None
        return self.step.layer.shape[-1]


def parameters_of(conversion: Conversion, targets: Mapping[str, Target]) -> list[str]:
    """Return for every step the parameter that its tensor becomes, an empty string where the model has none.

    Args:
        conversion: its steps.
        targets: where the tensors of the source go; rows that are a step of their own have their parameter's name.
    """
    found = []
    for step in conversion.steps:
        name = step.source.spec.name
        target = targets.get(name) or Target(name, name)
        found.append(target.parameter if target.known else "")
    return found


def find_tasks(conversion: Conversion, targets: Mapping[str, Target], model: BlockModel) -> list[Task]:
    """Return what is to be calibrated: every linear layer of a decoder block that gets a scheme, in order of blocks."""
    tasks = []
    for index, (step, parameter) in enumerate(zip(conversion.steps, parameters_of(conversion, targets), strict=True)):
        block = model.block_of(parameter)
        if step.scheme is None or step.layer is None or block is None or step.layer.embedding:
            continue
        target = targets.get(step.source.spec.name) or Target(parameter, parameter)
        inside = model.name_of(block, "") + "."
        owner, _, own = parameter.rpartition(".")
        expert = None
        if step.layer.stacked or target.experts:
            site = Site(owner.removeprefix(inside), "down" if own == "down_proj" else "in")
            if target.experts:
                expert = int(target.name.removeprefix(f"{target.experts}.").partition(".")[0])
        else:
            site = Site(owner.removeprefix(inside))
        tasks.append(Task(index, step, block, site, parameter, expert))
    return sorted(tasks, key=lambda task: (task.block, task.index))


def read_tensor(step: Step) -> torch.Tensor:
    """Read a step's tensor in its stored shape; what is stored compressed is decoded to float32.

    Raises:
        CheckpointError: the disk does not give it.
    """
    spec = step.source.spec
    if isinstance(step.source, DecodedTensor):
        return step.source.read_rows(0, spec.shape[0])
    result = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
    if result.numel():
        step.source.file.read_into(spec, 0, result.reshape(-1).view(torch.uint8).numpy().data)
    return result


def replaced(step: Step, value: torch.Tensor) -> Step:
    """Return a step that finds another tensor in its source: `value`, of the same shape and dtype."""
    source = step.source
    changed = DecodedTensor(source.file, source.spec, (source,), lambda first, last: value[first:last].float())
    return replace(step, source=changed)


def matrices(step: Step, stored: torch.Tensor) -> torch.Tensor:
    """Return a stored weight as [OC, IC], or [E, OC, IC] of experts."""
    assert step.layer is not None
    return stored.transpose(-1, -2) if step.layer.transposed else stored


def decode(step: Step, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return what a weight's packed tensors stand for, in the source's shape.

    Args:
        step: whose weight it is.
        tensors: by their names in `checkpoint.names`, of experts with one axis more in front.
        dtype: of the result, rounded once from float32.
    """
    assert step.layer is not None and step.scheme is not None
    *experts, oc, ic = step.layer.shape

    scheme = step.scheme

    def one(own: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if isinstance(scheme, Assignment):
            return decode_mixed(scheme, ic, own).dequantize(dtype)
        if isinstance(scheme, Pruned):
            held = [own.get(name) for name in (SCALE, ZERO_POINT)]
            return SparseWeight.from_stored(scheme.sparse, (oc, ic), own[MASK], own[VALUES], *held).dequantize(dtype)
        of = (scheme, (oc, ic), own[PACKED], own[SCALE], own.get(ZERO_POINT))
        return PackedWeight(*of, outliers=own.get(OUTLIERS)).dequantize(dtype)

    if not experts:
        return matrices(step, one(tensors))
    parts: Sequence[torch.Tensor] = [
        one({name: tensor[expert] for name, tensor in tensors.items()}) for expert in range(experts[0])
    ]
    return matrices(step, torch.stack(list(parts)))
