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
from tersor.planner.graph.shares import span

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
    start, length = span(sizes[place.part], ranks, rank)
    split = tensor.unflatten(place.dim, tuple(sizes)) if len(sizes) > 1 else tensor
    piece = split.narrow(place.dim + place.part, start, length)
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
    ranks = len(pieces)
    lengths = [span(sizes[place.part], ranks, rank)[1] for rank in range(ranks)]
    split = [
        piece.unflatten(place.dim, (*sizes[: place.part], length, *sizes[place.part + 1 :]))
        for piece, length in zip(pieces, lengths, strict=True)
    ]
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
            start, length = span(operator.sizes[name], divided[name], place[name])
            indices = inputs[1] - start
            known = (indices >= 0) & (indices < length)
            inputs[1] = indices.where(known, torch.zeros_like(indices))
            assert operand == 0
    lengths = {
        name: span(size, divided[name], place[name])[1] if divided.get(name, 1) > 1 else size
        for name, size in operator.sizes.items()
    }
    args, kwargs = localized(operator, call, lengths)
    filled = [_fill(argument, inputs) for argument in args]
    # A slice need not have the strides that a view of the whole relies on.
    target = torch.ops.aten.reshape.default if base_name(call) in VIEWS else call.target
    made = target(*filled, **{key: _fill(argument, inputs) for key, argument in kwargs.items()})
    outputs = tuple(made) if isinstance(made, (tuple, list)) else (made,)
    if known is not None:
        mask = known.unsqueeze(-1) if base_name(call) == "aten.embedding" else known
        outputs = (outputs[0] * mask.to(outputs[0].dtype),)
    part = math.prod(lengths[name] / operator.sizes[name] for name in operator.sums)
    if base_name(call) == "aten.mean" and part < 1:
        outputs = tuple(output * part for output in outputs)
    return outputs


def _fill(argument: Any, inputs: Sequence[torch.Tensor]) -> Any:
    if isinstance(argument, Slot):
        return inputs[argument.index]
    if isinstance(argument, (list, tuple)):
        return type(argument)(_fill(item, inputs) for item in argument)
    return argument


def localized(operator: Operator, call: Call, lengths: Mapping[str, int]) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a call on slices, where names have these lengths: sizes and counts become theirs."""
    args, kwargs, name = list(call.args), dict(call.kwargs), base_name(call)
    if lengths == operator.sizes:
        return args, kwargs

    def local(of: str, whole: int) -> int:
        found = [length for key, length in lengths.items() if key == of or key.startswith(f"{of}.")]
        return math.prod(found) if found else whole

    if name in SIZED:
        args[1] = [math.prod(lengths[key] for key in names) for names in operator.dims[len(call.inputs)]]
    elif name == "aten.repeat":
        args[1] = [local(f"times{dim}", times) for dim, times in enumerate(args[1])]
    elif name == "aten.slice":
        dim, length = call.argument(1, "dim", 0), call.outputs[0][call.argument(1, "dim", 0)]
        mine = local("part", length)
        if mine != length:
            start = call.argument(2, "start") or 0
            first = (start + call.inputs[0][dim] if start < 0 else start) // length * mine
            args = [args[0], dim, first, first + mine]
    elif name == "aten.split_with_sizes":
        args[1] = [local("part", size) for size in args[1]]
    elif name == "aten.split":
        args[1] = local("part", args[1])
    elif name == "aten.convolution":
        args[8] = local("groups", args[8])
    elif name == "aten.group_norm":
        args[1] = local("groups", args[1])
    return args, kwargs
