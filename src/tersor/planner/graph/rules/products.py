"""Rules of products: matrices, convolutions, embeddings, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tersor.planner.graph.ir import Call, Slot
from tersor.planner.graph.names import Signature
from tersor.planner.graph.rules.base import Namer, base_name, rule, whole


@rule("aten.linear")
def linear(call: Call) -> Signature:
    """x [..., in], weight [out, in], bias [out]: contracts "in"."""
    namer = Namer(call)
    leading = len(call.inputs[0]) - 1
    output = namer.first
    for dim in range(leading):
        for operand in (0, output):
            namer.put(f"row{dim}", operand, dim)
    for operand, dim in ((0, -1), (1, 1)):
        namer.put("in", operand, dim)
    for operand, dim in ((1, 0), (output, -1), *(((2, 0),) if len(call.inputs) > 2 else ())):
        namer.put("out", operand, dim)
    return _product(namer, call, contracted=("in",), pair=(0, 1), bias=2)


def _product(
    namer: Namer, call: Call, *, contracted: Sequence[str], pair: tuple[int, int], bias: int, factor: float = 1.0
) -> Signature:
    """A product of two inputs, with a bias where there is an input of that index."""
    addends = (bias,) if bias < len(call.inputs) else ()
    return namer.signature(
        "matmul",
        sums=contracted,
        addends=addends,
        linear=tuple(tuple(sorted((place, *addends))) for place in pair),
        saves=pair,
        flops=2.0 * factor * math.prod(namer.sizes.values()),
    )


@rule("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.mv", "aten.dot")
def matrix_product(call: Call) -> Signature:
    """left [(batch,) row, in], right [(batch,) in, out], with an addend before them where the name has "add"."""
    namer = Namer(call)
    first = 1 if "add" in base_name(call) else 0
    left, right = namer.shapes[first], namer.shapes[first + 1]
    output = namer.first
    batched = len(left) == 3
    names = (["batch"] if batched else []) + (["row"] if len(left) > 1 else [])
    for dim, name in enumerate([*names, "in"]):
        namer.put(name, first, dim)
    for dim, name in enumerate([*(["batch"] if batched else []), "in", *(["out"] if len(right) > 1 else [])]):
        namer.put(name, first + 1, dim)
    of_output = names + (["out"] if len(right) > 1 else [])
    for dim, name in enumerate(of_output):
        namer.put(name, output, dim)
    if first:
        shape = namer.shapes[0]
        for dim in range(len(shape)):
            namer.put(of_output[len(of_output) - len(shape) + dim], 0, dim)
    return _product(namer, call, contracted=("in",), pair=(first, first + 1), bias=0 if first else len(call.inputs))


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_product(call: Call) -> Signature:
    """x [rows, in], weights [experts, in, out], offsets [experts]: rows of one expert lie together, so they stay."""
    namer, output = Namer(call), len(call.inputs)
    if len(call.inputs[0]) != 2 or len(call.inputs[1]) != 3:
        return whole(call, note=f"{call.name} of these ranks has no rule, so that every rank computes all of it")
    for name, places in (("in", ((0, 1), (1, 1))), ("out", ((1, 2), (output, 1)))):
        for operand, dim in places:
            namer.put(name, operand, dim)
    product = _product(namer, call, contracted=("in",), pair=(0, 1), bias=len(call.inputs))
    flops = 2.0 * math.prod(call.inputs[0]) * call.inputs[1][2]
    return replace(product, flops=flops, saves=tuple(range(len(call.inputs))))


@rule("aten.convolution")
def convolution(call: Call) -> Signature:
    """x [batch, in, ...], weight [out, in / groups, ...] (transposed: [in, out / groups, ...]), bias [out]."""
    namer, output = Namer(call), len(call.inputs)
    transposed, groups = bool(call.argument(6, "transposed")), int(call.argument(8, "groups", 1))
    channels_in, channels_out = call.inputs[0][1], call.outputs[0][1]
    names = {"in": channels_in // groups, "out": channels_out // groups}
    for operand in (0, output):
        namer.put("batch", operand, 0)
    places: list[tuple[int, int, str]] = [(0, 1, "in"), (output, 1, "out"), (1, 0, "in" if transposed else "out")]
    if len(call.inputs) > 2:
        places.append((2, 0, "out"))
    for operand, dim, name in places:
        namer.put("groups", operand, dim, groups)
        namer.put(name, operand, dim, names[name])
    other = "out" if transposed else "in"
    namer.put(other, 1, 1, names[other])
    flops = 2.0 * math.prod(call.outputs[0]) * names["in"] * math.prod(call.inputs[1][2:])
    if transposed:
        flops = 2.0 * math.prod(call.inputs[0]) * names["out"] * math.prod(call.inputs[1][2:])
    product = _product(namer, call, contracted=("in",), pair=(0, 1), bias=2)
    return replace(product, kind="convolution", flops=flops)


@rule("aten.embedding")
def embedding(call: Call) -> Signature:
    """weight [vocabulary, width], indices [...]: a rank with a part of the vocabulary has zeros for the others."""
    namer, output = Namer(call), len(call.inputs)
    namer.put("vocabulary", 0, 0)
    for dim in range(len(call.inputs[1])):
        for operand in (1, output):
            namer.put(f"row{dim}", operand, dim)
    for operand, dim in ((0, 1), (output, -1)):
        namer.put("width", operand, dim)
    return namer.signature("embedding", sums=("vocabulary",), linear=((0,),), saves=(1,), unsplit=("vocabulary",))


@rule("aten.scaled_dot_product_attention")
def attention(call: Call) -> Signature:
    """q [..., heads, rows, in], k [..., heads, columns, in], v [..., heads, columns, width], mask broadcast to scores.

    Grouped queries: the heads of q are ("heads", "group"), those of k and v "heads". Rows of a causal product stay,
    since a rank's rows would need to know where they begin; columns are normalised over.
    """
    namer, output = Namer(call), len(call.inputs)
    query, key = call.inputs[0], call.inputs[1]
    rank = len(query)
    lead = rank - 2
    causal = bool(call.argument(5, "is_causal", False))
    grouped = bool(call.kwargs.get("enable_gqa", False))
    keep = ["in", "columns"] + (["rows"] if causal else [])
    for operand in (0, 1, 2, output):
        for dim in range(lead):
            size = key[dim] if grouped and dim == lead - 1 else None
            namer.put("heads" if dim == lead - 1 else f"batch{dim}", operand, dim, size)
            if grouped and dim == lead - 1 and operand in (0, output):
                namer.put("group", operand, dim, query[dim] // key[dim])
    for name, places in (
        ("rows", ((0, -2), (output, -2))),
        ("in", ((0, -1), (1, -1))),
        ("columns", ((1, -2), (2, -2))),
        ("width", ((2, -1), (output, -1))),
    ):
        for operand, dim in places:
            namer.put(name, operand, dim)
    if isinstance(call.argument(3, "attn_mask"), Slot):
        _name_mask(namer, lead, grouped)
    scores = math.prod(query[:-1]) * key[-2]
    flops = 2.0 * scores * (query[-1] + call.inputs[2][-1])
    return namer.signature("attention", keep=keep, linear=((2,),), saves=(*range(output), output), flops=flops)


def _name_mask(namer: Namer, lead: int, grouped: bool) -> None:
    """Name the dimensions of a mask that broadcasts to [..., heads, rows, columns]."""
    shape = namer.shapes[3]
    scores = [namer.dims[0][dim] for dim in range(lead + 1)] + [namer.dims[1][-2]]
    for dim in range(len(shape)):
        for name in scores[len(scores) - len(shape) + dim]:
            if shape[dim] > 1:
                namer.put(name, 3, dim, namer.sizes[name])
