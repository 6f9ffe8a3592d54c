"""Rules of operators that look along a whole dimension: sums, softmax, norms, pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tersor.planner.graph.ir import Call
from tersor.planner.graph.names import Signature
from tersor.planner.graph.rules.base import Namer, aligned, base_name, rule, shared, whole


def _reduced(call: Call) -> tuple[set[int], bool]:
    """Return the dimensions that are reduced, and whether they stay with size 1."""
    rank = len(call.inputs[0])
    dims = call.argument(1, "dim")
    if dims is None or dims == [] or isinstance(dims, bool):
        return set(range(rank)), len(call.outputs[0]) == rank
    dims = [dims] if isinstance(dims, int) else dims
    return {dim % rank for dim in dims}, len(call.outputs[0]) == rank


def _reduce(call: Call) -> tuple[Namer, list[str]]:
    """Name input and outputs of a reduction; return the names that it reduces, too."""
    namer = Namer(call)
    dims, kept = _reduced(call)
    names = [f"dim{dim}" for dim in sorted(dims) if call.inputs[0][dim] > 1]
    for dim in range(len(call.inputs[0])):
        namer.put(f"dim{dim}", 0, dim)
        if dim not in dims:
            place = dim if kept else dim - sum(other < dim for other in dims)
            for output in range(1, len(namer.shapes)):
                namer.put(f"dim{dim}", output, place)
    return namer, names


@rule("aten.sum", "aten.mean")
def add_up(call: Call) -> Signature:
    """A sum or mean: a rank with a part of what is reduced has an addend."""
    namer, names = _reduce(call)
    return namer.signature("reduce", sums=names, linear=((0,),), saves=(), flops=float(math.prod(call.inputs[0])))


@rule("aten.amax", "aten.amin", "aten.max", "aten.min", "aten.argmax", "aten.argmin", "aten.var", "aten.std")
def look_over(call: Call) -> Signature:
    """What is reduced stays whole."""
    namer, names = _reduce(call)
    saves = range(len(namer.shapes))
    return namer.signature("reduce", keep=names, saves=saves, flops=float(math.prod(call.inputs[0])))


for _name in ("aten.any", "aten.all", "aten.prod", "aten.logsumexp"):
    rule(_name)(look_over)


@rule("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten.cumsum", "aten.cumprod")
def along(call: Call) -> Signature:
    """Input and output have one shape, and one dimension is looked at as a whole."""
    namer, rank = Namer(call), len(call.inputs[0])
    aligned(namer, (0, 1))
    dim = call.argument(1, "dim") % max(1, rank)
    summed = base_name(call).startswith("aten.cumsum")
    return namer.signature(
        "along",
        keep=(f"dim{dim}",),
        linear=((0,),) if summed else (),
        saves=() if summed else (1,),
        flops=4.0 * math.prod(call.inputs[0]),
    )


@rule("aten.sort", "aten.topk", "aten.flip", "aten.roll")
def ordered(call: Call) -> Signature:
    """Along one dimension, whose size may change, anything may move; the others stay apart."""
    name = base_name(call)
    namer, rank = Namer(call), len(call.inputs[0])
    dims = call.argument(2 if name == "aten.topk" else 1, "dim", -1)
    if name == "aten.roll":
        dims = call.argument(2, "dims", list(range(rank)))
    elif name == "aten.flip":
        dims = call.args[1]
    moved = {dim % max(1, rank) for dim in ([dims] if isinstance(dims, int) else dims)}
    shared(namer, range(len(namer.shapes)), [dim for dim in range(rank) if dim not in moved])
    return namer.signature("along", saves=range(1, len(namer.shapes)), flops=4.0 * math.prod(call.inputs[0]))


@rule("aten.layer_norm", "aten.rms_norm", "aten._fused_rms_norm", "aten.native_layer_norm")
def norm(call: Call) -> Signature:
    """x [..., normalised], weight and bias [normalised]: normalised dimensions stay whole."""
    namer, rank = Namer(call), len(call.inputs[0])
    count = len(call.args[1])
    for dim in range(rank):
        for operand in (0, len(call.inputs)):
            namer.put(f"dim{dim}", operand, dim)
        for output in range(len(call.inputs) + 1, len(namer.shapes)):
            if dim < rank - count:
                namer.put(f"dim{dim}", output, dim)
    for operand in range(1, len(call.inputs)):
        for dim in range(count):
            namer.put(f"dim{rank - count + dim}", operand, dim)
    keep = [f"dim{dim}" for dim in range(rank - count, rank)]
    return namer.signature("norm", keep=keep, saves=(0, 1)[: len(call.inputs)], flops=8.0 * math.prod(call.inputs[0]))


@rule("aten.group_norm")
def group_norm(call: Call) -> Signature:
    """x [batch, channels, ...], weight and bias [channels]: channels are ("groups", "channel")."""
    namer, output = Namer(call), len(call.inputs)
    groups, channels = call.args[1], call.inputs[0][1]
    for operand in (0, output):
        namer.put("batch", operand, 0)
    for operand in range(output + 1):
        dim = 1 if operand in (0, output) else 0
        namer.put("groups", operand, dim, groups)
        namer.put("channel", operand, dim, channels // groups)
    keep = _spatial(namer, (0, output))
    saves = (0, 1)[: len(call.inputs)]
    return namer.signature("norm", keep=("channel", *keep), saves=saves, flops=8.0 * math.prod(call.inputs[0]))


def _spatial(namer: Namer, operands: Sequence[int]) -> list[str]:
    """Name dimensions behind batch and channels, which stay whole; return their names."""
    names = []
    for dim in range(2, len(namer.shapes[operands[0]])):
        if len({namer.shapes[operand][dim] for operand in operands}) == 1:
            names.append(f"space{dim - 2}")
            for operand in operands:
                namer.put(names[-1], operand, dim)
    return names


@rule("aten._native_batch_norm_legit_functional", "aten._native_batch_norm_legit_no_training")
def batch_norm(call: Call) -> Signature:
    """x [batch, channels, ...], vectors [channels]: with the statistics of the batch, it stays whole."""
    return _batch_norm(call, base_name(call) == "aten._native_batch_norm_legit_functional" and bool(call.args[5]))


@rule("aten._native_batch_norm_legit")
def batch_norm_without_running(call: Call) -> Signature:
    """The same without running statistics, which is how a norm of instances is computed: always of the batch."""
    if call.name != "aten._native_batch_norm_legit.no_stats":
        return whole(call, note=f"no rule for {call.name}, so that every rank computes all of it")
    return _batch_norm(call, training=True)


def _batch_norm(call: Call, training: bool) -> Signature:
    namer, output = Namer(call), len(call.inputs)
    for operand, shape in enumerate(namer.shapes):
        namer.put("channels", operand, 1 if operand in (0, output) else 0)
        if operand in (0, output):
            namer.put("batch", operand, 0)
            assert len(shape) > 1
    keep = _spatial(namer, (0, output))
    return namer.signature(
        "norm",
        keep=("batch", *keep) if training else (),
        saves=(0, 1)[: len(call.inputs)],
        flops=8.0 * math.prod(call.inputs[0]),
    )


@rule("aten.max_pool2d_with_indices", "aten.avg_pool2d", "aten._adaptive_avg_pool2d")
def pool(call: Call) -> Signature:
    """x [batch, channels, height, width]: height and width stay whole."""
    namer = Namer(call)
    batched = len(call.inputs[0]) == 4
    for operand in range(len(namer.shapes)):
        if batched:
            namer.put("batch", operand, 0)
        namer.put("channels", operand, 1 if batched else 0)
    mean = "avg" in base_name(call)
    kept = range(1, len(namer.shapes))
    return namer.signature(
        "pool",
        linear=((0,),) if mean else (),
        saves=() if mean else (0, *kept),
        flops=float(math.prod(call.inputs[0])),
    )


for _name in ("aten.upsample_nearest2d", "aten.upsample_bilinear2d"):
    rule(_name)(pool)
