"""What one rank computes of an operator that is cut: its slices, and the call on them.

This is what the rules mean. Tests run every rule with it against the whole operator, and the runner of plans uses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tersor.planner.graph.ir import SUM, WHOLE, Call, Operator, Placement, Slot
from tersor.planner.graph.rules.base import base_name

VIEWS = ("aten.view", "aten._unsafe_view", "aten.reshape")
SIZED = (*VIEWS, "aten.expand")
"""Operators whose argument 1 is the shape of the output."""


def take(tensor: torch.Tensor, place: Placement, parts: Sequence[Sequence[int]], rank: int, ranks: int) -> torch.Tensor:
    """Return what a rank has of a whole value: a slice, an addend (rank 0 has all of it), or all."""
    if place == WHOLE:
        return tensor
    if place == SUM:
        return tensor if rank == 0 else torch.zeros_like(tensor)
    sizes = parts[place.dim]
    step = sizes[place.part] // ranks
    split = tensor.unflatten(place.dim, tuple(sizes)) if len(sizes) > 1 else tensor
    piece = split.narrow(place.dim + place.part, rank * step, step)
    return piece.flatten(place.dim, place.dim + len(sizes) - 1) if len(sizes) > 1 else piece


def join(pieces: Sequence[torch.Tensor], place: Placement, parts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the whole value of what the ranks have."""
    if place == WHOLE:
        return pieces[0]
    if place == SUM:
        return torch.stack(tuple(pieces)).sum(dim=0)
    sizes = list(parts[place.dim])
    if len(sizes) == 1:
        return torch.cat(tuple(pieces), dim=place.dim)
    sizes[place.part] //= len(pieces)
    split = [piece.unflatten(place.dim, tuple(sizes)) for piece in pieces]
    return torch.cat(split, dim=place.dim + place.part).flatten(place.dim, place.dim + len(sizes) - 1)


def run(
    operator: Operator,
    inputs: Sequence[torch.Tensor],
    divided: Mapping[str, int] | None = None,
    place: Mapping[str, int] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Run an operator on a rank's inputs.

    Args:
        operator: it, with its call.
        inputs: the rank's part of each input.
        divided: into how many slices each name is cut.
        place: which of these slices the rank has.
    """
    divided, place = divided or {}, place or {}
    call = operator.call
    assert call is not None, f"{operator.name} has no call"
    inputs = list(inputs)
    known = None
    for name, operand in (("vocabulary", 0), ("places", 0)):
        if divided.get(name, 1) > 1:
            step = operator.sizes[name] // divided[name]
            indices = inputs[1] - place[name] * step
            known = (indices >= 0) & (indices < step)
            inputs[1] = indices.where(known, torch.zeros_like(indices))
            assert operand == 0
    args, kwargs = localized(operator, call, divided)
    filled = [_fill(argument, inputs) for argument in args]
    # A slice need not have the strides that a view of the whole relies on.
    target = torch.ops.aten.reshape.default if base_name(call) in VIEWS else call.target
    made = target(*filled, **{key: _fill(argument, inputs) for key, argument in kwargs.items()})
    outputs = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    if known is not None:
        mask = known.unsqueeze(-1) if base_name(call) == "aten.embedding" else known
        outputs = (outputs[0] * mask.to(outputs[0].dtype),)
    slices = math.prod(divided.get(name, 1) for name in operator.sums)
    if base_name(call) == "aten.mean" and slices > 1:
        outputs = tuple(output / slices for output in outputs)
    return outputs


def _fill(argument: Any, inputs: Sequence[torch.Tensor]) -> Any:
    if isinstance(argument, Slot):
        return inputs[argument.index]
    if isinstance(argument, (list, tuple)):
        return type(argument)(_fill(item, inputs) for item in argument)
    return argument


def localized(operator: Operator, call: Call, divided: Mapping[str, int]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call on slices: sizes and counts that its rule names are divided."""
    args, kwargs, name = list(call.args), dict(call.kwargs), base_name(call)
    if not any(count > 1 for count in divided.values()):
        return args, kwargs

    def share(of: str) -> int:
        return math.prod(count for key, count in divided.items() if key == of or key.startswith(f"{of}."))

    if name in SIZED:
        args[1] = [
            size // math.prod(divided.get(key, 1) for key in names)
            for size, names in zip(call.outputs[0], operator.dims[len(call.inputs)], strict=True)
        ]
    elif name == "aten.repeat":
        args[1] = [times // share(f"times{dim}") for dim, times in enumerate(args[1])]
    elif name == "aten.slice" and share("part") > 1:
        dim = call.argument(1, "dim", 0)
        start = call.argument(2, "start") or 0
        start = start + call.inputs[0][dim] if start < 0 else start
        length = call.outputs[0][dim]
        args = [args[0], dim, start // share("part"), (start + length) // share("part")]
    elif name == "aten.split_with_sizes":
        args[1] = [size // share("part") for size in args[1]]
    elif name == "aten.split":
        args[1] = args[1] // share("part")
    elif name == "aten.convolution":
        args[8] //= share("groups")
    elif name == "aten.group_norm":
        args[1] //= share("groups")
    return args, kwargs
