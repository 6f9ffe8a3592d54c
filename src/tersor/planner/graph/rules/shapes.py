"""Rules of operators that only move or repeat numbers: views, permutations, parts, joins."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tersor.planner.graph.ir import Call
from tersor.planner.graph.names import Signature, common
from tersor.planner.graph.rules.base import Namer, base_name, rule, whole


def _runs(first: Sequence[int], second: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return runs of dimensions of two shapes that hold the same numbers, in order, as short as can be."""
    runs: list[tuple[list[int], list[int]]] = []
    left = [dim for dim, size in enumerate(first) if size != 1]
    right = [dim for dim, size in enumerate(second) if size != 1]
    while left:
        mine, theirs = [left.pop(0)], [right.pop(0)]
        while (a := math.prod(first[d] for d in mine)) != (b := math.prod(second[d] for d in theirs)):
            if a < b:
                mine.append(left.pop(0))
            else:
                theirs.append(right.pop(0))
        runs.append((mine, theirs))
    return runs


@rule("aten.view", "aten._unsafe_view", "aten.reshape", "aten.unsqueeze", "aten.squeeze")
def view(call: Call) -> Signature:
    """The same numbers in the same order: runs of dimensions are split into parts that both shapes consist of."""
    namer = Namer(call)
    first, second = call.inputs[0], call.outputs[0]
    if 0 in first:
        return whole(call, kind="view")
    for mine, theirs in _runs(first, second):
        factors = common([first[d] for d in mine], [second[d] for d in theirs])
        if factors is None:
            continue
        for operand, dims in ((0, mine), (1, theirs)):
            rest = list(enumerate(factors))
            for dim in dims:
                taken = 1
                while taken < namer.shapes[operand][dim]:
                    index, size = rest.pop(0)
                    namer.put(f"dim{mine[0]}" if len(factors) == 1 else f"dim{mine[0]}_{index}", operand, dim, size)
                    taken *= size
    return namer.signature("view", linear=((0,),), saves=(), flops=0.0)


@rule("aten.permute", "aten.transpose", "aten.t")
def permute(call: Call) -> Signature:
    """The same numbers, dimensions in another order."""
    namer, rank = Namer(call), len(call.inputs[0])
    order = list(range(rank))
    if base_name(call) == "aten.permute":
        order = [dim % rank for dim in call.args[1]]
    elif rank > 1:
        one, other = (call.args[1], call.args[2]) if base_name(call) == "aten.transpose" else (0, 1)
        order[one], order[other] = order[other], order[one]
    for place, dim in enumerate(order):
        for operand, mine in ((0, dim), (1, place)):
            namer.put(f"dim{dim}", operand, mine)
    return namer.signature("view", linear=((0,),), saves=(), flops=0.0)


@rule("aten.expand")
def expand(call: Call) -> Signature:
    """Dimensions of size 1 become larger: they may be cut, each rank has its part of the same."""
    namer = Namer(call)
    first, second = call.inputs[0], call.outputs[0]
    for dim in range(len(second)):
        namer.put(f"dim{dim}", 1, dim)
        mine = dim - (len(second) - len(first))
        if mine >= 0:
            namer.put(f"dim{dim}", 0, mine)
    return namer.signature("view", linear=((0,),), saves=(), flops=0.0)


@rule("aten.repeat")
def repeat(call: Call) -> Signature:
    """A dimension becomes (times, dimension)."""
    namer = Namer(call)
    shift = len(call.outputs[0]) - len(call.inputs[0])
    for dim, times in enumerate(call.args[1]):
        namer.put(f"times{dim}", 1, dim, times)
        size = call.inputs[0][dim - shift] if dim >= shift else 1
        namer.put(f"dim{dim}", 1, dim, size)
        if dim >= shift:
            namer.put(f"dim{dim}", 0, dim - shift)
    return namer.signature("repeat", linear=((0,),), saves=())


def _same_but(namer: Namer, dim: int, operands: Sequence[int]) -> None:
    """Name all dimensions of operands of one rank but one."""
    for other in range(len(namer.shapes[operands[0]])):
        if other != dim:
            for operand in operands:
                namer.put(f"dim{other}", operand, other)


def _parts_of(call: Call, dim: int, kind: str) -> Signature:
    """Outputs are parts of the input along `dim`: of equal size, it is (parts, part), and all may be cut alike."""
    namer = Namer(call)
    outputs = range(1, len(namer.shapes))
    _same_but(namer, dim, (0, *outputs))
    sizes = {namer.shapes[output][dim] for output in outputs}
    size = sizes.pop()
    if not sizes and size and namer.shapes[0][dim] % size == 0:
        namer.put("parts", 0, dim, namer.shapes[0][dim] // size)
        for operand in (0, *outputs):
            namer.put("part", operand, dim, size)
    return namer.signature(kind, keep=("parts",), linear=((0,),), saves=(), flops=0.0)


@rule("aten.split_with_sizes", "aten.split")
def split(call: Call) -> Signature:
    """Parts of one dimension, one behind the other."""
    return _parts_of(call, call.argument(2, "dim", 0) % len(call.inputs[0]), "view")


@rule("aten.slice")
def slice_(call: Call) -> Signature:
    """A span of one dimension; one of several equal parts may be cut."""
    dim = call.argument(1, "dim", 0) % len(call.inputs[0])
    size = call.inputs[0][dim]
    start = call.argument(2, "start") or 0
    start = max(0, start + size) if start < 0 else min(start, size)
    length, step = call.outputs[0][dim], call.argument(4, "step", 1)
    if step == 1 and length and size % length == 0 and start % length == 0:
        return _parts_of(call, dim, "view")
    namer = Namer(call)
    _same_but(namer, dim, (0, 1))
    return namer.signature("view", linear=((0,),), saves=(), flops=0.0)


@rule("aten.select", "aten.unbind")
def select(call: Call) -> Signature:
    """One index of a dimension, which goes."""
    namer = Namer(call)
    place = 2 if base_name(call) == "aten.select" else 1
    dim = (call.argument(1, "dim", 0) if place == 2 or len(call.args) > 1 else 0) % len(call.inputs[0])
    for other in range(len(call.inputs[0])):
        if other != dim:
            for operand in range(len(namer.shapes)):
                namer.put(f"dim{other}", operand, other - (operand > 0 and other > dim))
    return namer.signature("view", linear=((0,),), saves=(), flops=0.0)


@rule("aten.cat")
def cat(call: Call) -> Signature:
    """Inputs one behind the other: of equal size, the dimension is (parts, part), and all may be cut alike."""
    namer, output = Namer(call), len(call.inputs)
    dim = call.argument(1, "dim", 0) % len(call.outputs[0])
    if any(len(shape) != len(call.outputs[0]) for shape in call.inputs):
        return whole(call, kind="cat")
    _same_but(namer, dim, range(output + 1))
    sizes = {shape[dim] for shape in call.inputs}
    if len(sizes) == 1:
        namer.put("parts", output, dim, output)
        for operand in range(output + 1):
            namer.put("part", operand, dim, next(iter(sizes)))
    return namer.signature("cat", keep=("parts",), linear=(tuple(range(output)),), saves=())


@rule("aten.stack")
def stack(call: Call) -> Signature:
    """Inputs along a new dimension."""
    namer, output = Namer(call), len(call.inputs)
    dim = call.argument(1, "dim", 0) % len(call.outputs[0])
    for other in range(len(call.inputs[0])):
        for operand in range(output + 1):
            namer.put(f"dim{other}", operand, other + (operand == output and other >= dim))
    return namer.signature("cat", linear=(tuple(range(output)),), saves=())


@rule("aten.constant_pad_nd")
def pad(call: Call) -> Signature:
    """Padded dimensions stay; zeros around a pending sum leave it one."""
    namer = Namer(call)
    for dim in range(len(call.inputs[0])):
        if call.inputs[0][dim] == call.outputs[0][dim]:
            for operand in (0, 1):
                namer.put(f"dim{dim}", operand, dim)
    return namer.signature("pad", linear=() if call.argument(2, "value", 0) else ((0,),), saves=())


@rule("aten.slice_scatter", "aten.select_scatter")
def scatter_span(call: Call) -> Signature:
    """The first input with a span, or an index, of one dimension from the second: that dimension stays."""
    namer = Namer(call)
    dim = call.argument(2, "dim", 0) % len(call.inputs[0])
    narrow = len(call.inputs[1]) < len(call.inputs[0])
    for other in range(len(call.inputs[0])):
        if other != dim:
            for operand, place in ((0, other), (1, other - (narrow and other > dim)), (2, other)):
                namer.put(f"dim{other}", operand, place)
    return namer.signature("cat", linear=((0, 1),), saves=())
