"""Operators of torch on the slices of several ranks, one behind the other in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tersor.planner.graph.cuts import Way, gradient_way
from tersor.planner.graph.ir import SUM, WHOLE, Call, Operator, Parts, Placement, Slot
from tersor.planner.graph.local import join, run, take
from tersor.planner.graph.names import Named, settle
from tersor.planner.graph.rules import signature_of
from tersor.planner.graph.trace import operator_of
from tersor.planner.graph.training import gradient_of


def operator(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, split: Mapping[str, tuple[int, ...]] = {}
) -> tuple[Operator, list[torch.Tensor], dict[str, Parts]]:
    """Return an operator of this call, its inputs, and the parts of all operands; `split` splits names by force."""
    inputs: list[torch.Tensor] = []

    def read(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            inputs.append(item)
            return Slot(len(inputs) - 1)
        return type(item)(read(inner) for inner in item) if isinstance(item, (list, tuple)) else item

    slots, named = tuple(read(item) for item in args), {key: read(item) for key, item in (kwargs or {}).items()}
    made = target(*args, **(kwargs or {}))
    outputs = list(made) if isinstance(made, (tuple, list)) else [made]
    call = Call(target, slots, named, tuple(tuple(x.shape) for x in inputs), tuple(tuple(x.shape) for x in outputs))
    names = [f"x{index}" for index in range(len(inputs))] + [f"y{index}" for index in range(len(outputs))]
    begun = Named.begin(call, tuple(names), signature_of(call))
    for name, sizes in split.items():
        begun.split[name] = sizes
    parts = settle([begun], dict(zip(names, (*call.inputs, *call.outputs), strict=True)))
    return operator_of("op", "", begun), inputs, parts


def addends(tensor: torch.Tensor, ranks: int, seed: int) -> list[torch.Tensor]:
    """Return one addend of a tensor for each rank, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for _ in range(ranks - 1)]
    return [*noise, tensor - sum(noise)]


def spread(tensor: torch.Tensor, place: Placement, parts: Parts, ranks: int) -> list[torch.Tensor]:
    """Return what each rank has of a whole value."""
    if place == SUM:
        return addends(tensor, ranks, seed=7)
    return [take(tensor, place, parts, rank, ranks) for rank in range(ranks)]


def outputs_of_ranks(
    made: Operator, inputs: Sequence[torch.Tensor], parts: Mapping[str, Parts], way: Way, ranks: int
) -> list[torch.Tensor]:
    """Return the whole outputs, put together of what the ranks compute."""
    pieces = [
        spread(tensor, place, parts[name], ranks)
        for tensor, place, name in zip(inputs, way.places, made.inputs, strict=False)
    ]
    results = [
        run(made, [piece[rank] for piece in pieces], {way.name: ranks} if way.cuts else {}, {way.name: rank})
        for rank in range(ranks)
    ]
    places = way.places[len(made.inputs) :]
    return [
        join([result[index] for result in results], place, parts[name])
        for index, (place, name) in enumerate(zip(places, made.outputs, strict=True))
    ]


def gradients_of_ranks(
    made: Operator, inputs: Sequence[torch.Tensor], parts: Mapping[str, Parts], way: Way, ranks: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the gradients of all floating-point inputs: of the whole operator, and put together of the ranks'."""
    count = len(made.inputs)
    statistics = (3, 4) if "batch_norm" in str(made.call and made.call.target) else ()
    wanted = [place for place, x in enumerate(inputs) if x.is_floating_point() and place not in statistics]
    whole = [x.detach().requires_grad_(place in wanted) for place, x in enumerate(inputs)]
    outputs = [output for output in run(made, whole) if output.requires_grad]
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(output.shape, generator=generator, dtype=output.dtype) for output in outputs]
    index = [place for place, output in enumerate(run(made, whole)) if output.requires_grad]
    gradient = gradient_of(made, wanted, {place: [f"g{place}"] for place in index})
    of = gradient_way(way, made, gradient)
    where = dict(zip(gradient.of, of.places, strict=True))
    expected = torch.autograd.grad(outputs, [whole[place] for place in wanted], given, allow_unused=True)
    found: list[list[torch.Tensor]] = [[] for _ in wanted]
    pieces = [
        spread(tensor, place, parts[name], ranks)
        for tensor, place, name in zip(inputs, way.places, made.inputs, strict=False)
    ]
    for rank in range(ranks):
        local = [piece[rank].detach().requires_grad_(place in wanted) for place, piece in enumerate(pieces)]
        results = run(made, local, {way.name: ranks} if way.cuts else {}, {way.name: rank})
        cotangents = []
        for position, whole_gradient in zip(index, given, strict=True):
            place = where["gradient", count + position]
            cotangents.append(take(whole_gradient, place, parts[made.outputs[position]], rank, ranks))
        got = torch.autograd.grad(
            [results[place] for place in index], [local[place] for place in wanted], cotangents, allow_unused=True
        )
        for place, tensor in enumerate(got):
            found[place].append(torch.zeros_like(local[wanted[place]]) if tensor is None else tensor)
    joined = [
        join(pieces_, where["gradient", place], parts[made.inputs[place]])
        for place, pieces_ in zip(wanted, found, strict=True)
    ]
    zero = [torch.zeros_like(whole[place]) for place in wanted]
    return [e if e is not None else z for e, z in zip(expected, zero, strict=True)], joined


__all__ = ["SUM", "WHOLE", "gradients_of_ranks", "operator", "outputs_of_ranks"]
