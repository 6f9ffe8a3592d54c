"""Is a plan sound? Every weight is there once, every pending sum is reduced, every rank fits, and a second cost agrees.

What is read of the plan is what its file holds: a plan that was edited by hand is checked like one that was searched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from tersor.errors import InputError
from tersor.layouts.shard import Span
from tersor.planner.cost import Kernels
from tersor.planner.links import Links
from tersor.planner.parts import Kind, Model, Weight
from tersor.planner.plan import Chosen, Cut, Plan, Slice
from tersor.planner.simulate import Walk, Walked

TOLERANCE = 1e-9
"""By how much of them the seconds of two cost models may differ."""

LAYOUTS: dict[str, dict[str, tuple[str, str]]] = {
    "norm": {"replicate": ("R", "R"), "sequence": ("S", "S")},
    "qkv": {"replicate": ("R", "R"), "sequence": ("S", "S"), "column": ("R", "H")},
    "attention": {"replicate": ("R", "R"), "head": ("H", "H"), "batch": ("S", "S")},
    "out": {"replicate": ("R", "R"), "sequence": ("S", "S"), "row": ("H", "P"), "column": ("R", "C")},
    "gate_up": {"replicate": ("R", "R"), "sequence": ("S", "S"), "column": ("R", "I")},
    "down": {"replicate": ("R", "R"), "sequence": ("S", "S"), "row": ("I", "P"), "column": ("R", "C")},
    "experts": {"replicate": ("R", "R"), "tensor": ("R", "P"), "expert": ("R", "P")},
    "embedding": {"replicate": ("R", "R"), "vocabulary": ("R", "P")},
    "head": {"replicate": ("R", "R"), "vocabulary": ("R", "V")},
    "sample": {"replicate": ("R", "R")},
}
"""Block -> way -> what it reads and gives; the norms are alike, experts of several replicas read and give S, and
attention that has rows dealt out reads and gives all of a prompt."""


def check(plan: Plan, model: Model, kernels: Kernels, links: Links) -> Walked:
    """Hold a plan against its model and prices, and return what the second cost model finds.

    Raises:
        InputError: the plan is for another model, chip or links, or is not sound; the line says what is wrong.
    """
    for what, own, other in (
        ("model", plan.digest, model.digest),
        ("chip", plan.chip, kernels.chip.name),
        ("links", plan.links, links.label),
    ):
        if own != other:
            detail = f" ({plan.model})" if what == "model" else ""
            raise InputError(f"the plan is for {what} {own}{detail}, and this is {what} {other}")
    sound(plan, model)
    for number, stage in enumerate(plan.stages):
        for rank, memory in enumerate(stage.memory):
            if memory.total > memory.room:
                lacks = (memory.total - memory.room) / 1e9
                raise InputError(f"rank {rank} of stage {number} lacks {lacks:.1f} GB of {memory.room / 1e9:.1f} GB")
    walked = Walk(plan, model, kernels, links).walked()
    _check_costs(plan, walked)
    return walked


def sound(plan: Plan, model: Model) -> None:
    """Hold that a plan is of all layers and weights of a model, and that each rank has what its blocks read.

    Raises:
        InputError: it is not; the line says what is wrong.
    """
    _check_axes(plan, model)
    _check_weights(plan, model)
    _check_layouts(plan, model)
    _check_held(plan, model)


def _check_axes(plan: Plan, model: Model) -> None:
    if min(plan.data, plan.pipeline, plan.tensor, plan.expert) < 1 or plan.idle < 0:
        raise InputError(f"the plan's axes are {plan.axes()} with {plan.idle} idle devices: each is at least 1")
    if len(plan.stages) != plan.pipeline:
        raise InputError(f"the plan has {len(plan.stages)} stages, and {plan.pipeline} pipeline ranks")
    if plan.data % plan.expert:
        raise InputError(f"{plan.data} replicas are no whole groups of {plan.expert} that share experts")
    bounds = [plan.stages[0].first, *(stage.last for stage in plan.stages)]
    starts = [stage.first for stage in plan.stages]
    if bounds[0] or bounds[:-1] != starts or bounds[-1] != len(model.layers) or bounds != sorted(set(bounds)):
        spans = ", ".join(f"{stage.first} to {stage.last}" for stage in plan.stages)
        raise InputError(f"stages have layers {spans}, and the model has 0 to {len(model.layers)}")
    if [stage.embedding for stage in plan.stages] != [True] + [False] * (plan.pipeline - 1):
        raise InputError("the embedding is not on the first stage alone")
    if [stage.head for stage in plan.stages] != [False] * (plan.pipeline - 1) + [True]:
        raise InputError("the output head is not on the last stage alone")
    devices = [device for stage in plan.stages for device in stage.devices]
    if len(devices) != len(set(devices)) or any(len(stage.devices) != plan.tensor for stage in plan.stages):
        raise InputError("a device has two places in a replica, or a stage has not as many devices as tensor ranks")


def _named(model: Model) -> Iterator[tuple[str, tuple[int, ...], Weight, Kind | None]]:
    yield model.embedding.module, (), model.embedding, None
    yield model.out.module, (), model.out, None
    for kind in model.kinds:
        for weight in kind.weights():
            yield kind.start + weight.module, kind.layers, weight, kind


def _check_weights(plan: Plan, model: Model) -> None:
    cuts: dict[tuple[str, int], Cut] = {}
    for cut in plan.cuts:
        for layer in cut.layers or (-1,):
            if cuts.setdefault((cut.module, layer), cut).slices != cut.slices:
                raise InputError(f"{cut.module} of layer {layer} is cut in two ways")
    for module, layers, weight, kind in _named(model):
        for layer in layers or (-1,):
            found = cuts.pop((module, layer), None)
            name = module.replace("{layer}", str(layer))
            if found is None:
                raise InputError(f"the plan has no cut of {name}")
            if len(found.slices) != plan.tensor:
                raise InputError(f"{name} has slices of {len(found.slices)} ranks, and there are {plan.tensor}")
            _check_slices(plan, name, weight, kind, found.slices)
    if cuts:
        raise InputError(f"the plan cuts {next(iter(cuts))[0]}, which the model has not")


def _check_slices(plan: Plan, name: str, weight: Weight, kind: Kind | None, slices: tuple[Slice, ...]) -> None:
    """Hold that the slices of a weight cover it once: all of it on every rank, or every row, column or expert once."""
    axes: dict[str, tuple[Sequence[tuple[Span, ...] | None], int]] = {
        "rows": ([own.rows for own in slices], weight.oc),
        "columns": ([None if own.columns is None else (own.columns,) for own in slices], weight.ic),
        "experts": ([None if own.experts is None else (own.experts,) for own in slices], weight.copies),
    }
    cut = [axis for axis, (spans, _) in axes.items() if any(one is not None for one in spans)]
    if len(cut) > 1:
        raise InputError(f"{name} is cut along {' and '.join(cut)}")
    for axis in cut:
        spans, size = axes[axis]
        if any(one is None for one in spans):
            raise InputError(f"{name}: some ranks have all {axis}, others a part")
        flat = sorted(span for own in spans if own is not None for span in own)
        repeated = kind is not None and plan.tensor > kind.kv_heads and weight in kind.qkv
        if axis == "experts":
            size = size // plan.expert if plan.expert > 1 else size
        if repeated:  # heads of keys and values that several ranks read
            flat = sorted(set(flat))
        end = 0
        for first, last in flat:
            if first != end or last < first:
                raise InputError(f"{name}: {axis} {min(first, end)} to {max(first, end)} are on no rank, or on two")
            end = last
        if end != size and not (axis == "experts" and plan.expert > 1):
            raise InputError(f"{name}: {axis} {end} to {size} are on no rank")
        if axis == "columns" and any(first % weight.quantum for first, _ in flat):
            raise InputError(f"{name}: columns do not start at whole quanta of {weight.quantum} channels")


def _check_layouts(plan: Plan, model: Model) -> None:
    chosen = {(one.phase, one.group, one.block): one for one in plan.chosen}

    def of(phase: str, group: str, block: str) -> Chosen:
        if (phase, group, block) not in chosen:
            raise InputError(f"the plan chooses nothing for {block} of {group} in {phase}")
        return chosen[phase, group, block]

    for phase in plan.workload["phases"]:
        blocks = {kind.name: _blocks(kind) for kind in model.kinds}
        order = [of(phase, "embedding", "embedding")]
        order += [of(phase, model.kinds[n].name, one) for n in model.layers for one in blocks[model.kinds[n].name]]
        order += [of(phase, one, one) for one in ("final_norm", "head", "sample")]
        for one in order:
            _check_way(plan, one)
        for before, after in pairwise(order):
            if after.reads == "P":
                raise InputError(f"{after.group}.{after.block} in {phase} reads a sum that is still pending")
            if before.gives not in ("R", "S", "P", after.reads) and after.reads not in ("R", "S"):
                raise InputError(
                    f"{before.group}.{before.block} gives {before.gives} in {phase}, and {after.block} reads "
                    f"{after.reads}"
                )
        if order[-1].gives == "P":
            raise InputError(f"the last sum of {phase} is pending")
    places = {(one.group, one.way) for one in plan.chosen if one.block == "attention"}
    if len(places) > len(model.kinds):
        words = ", ".join(f"{way} of {group}" for group, way in sorted(places))
        raise InputError(f"pages have one place, and attention is by {words}")
    _check_inner(plan, model)


def _check_way(plan: Plan, one: Chosen) -> None:
    known = LAYOUTS["norm" if one.block.endswith("norm") else one.block]
    if one.way not in known:
        raise InputError(f"{one.group}.{one.block} has way {one.way!r}: {', '.join(known)} are known")
    wanted = known[one.way]
    if one.block == "experts" and plan.expert > 1:
        wanted = ("S", "S") if plan.tensor > 1 else ("R", "R")
    if one.way == "batch" and one.phase == "prefill":
        wanted = ("R", "R")
    if (one.reads, one.gives) != wanted:
        raise InputError(f"{one.group}.{one.block} is cut by {one.way}: it reads and gives {wanted[0]} and {wanted[1]}")


def _check_held(plan: Plan, model: Model) -> None:
    """Hold that weights are cut along the axis that every phase's way asks for."""
    axes = {"row": "columns", "column": "rows", "vocabulary": "rows", "replicate": "", "sequence": ""}
    cuts = {(cut.module, layer): cut for cut in plan.cuts for layer in cut.layers or (-1,)}
    kinds = {kind.name: kind for kind in model.kinds}
    for one in plan.chosen:
        kind = kinds.get(one.group)
        if one.way not in axes or one.block not in ("qkv", "out", "gate_up", "down", "embedding", "head"):
            continue
        of_kind = {"qkv": kind.qkv, "out": (kind.out,), "gate_up": kind.gate_up} if kind else {}
        if kind is not None and kind.down is not None:
            of_kind["down"] = (kind.down,)
        ends = {"embedding": (model.embedding,), "head": (model.out,)}
        for weight in {**of_kind, **ends}[one.block]:
            name = (kind.start if kind else "") + weight.module
            own, wanted = cuts[name, kind.layers[0] if kind else -1].slices[0], axes[one.way]
            found = next((axis for axis in ("rows", "columns", "experts") if getattr(own, axis) is not None), "")
            if plan.tensor > 1 and found != wanted:
                words = f"has no {wanted} of its own" if wanted else f"has {found} of its own"
                raise InputError(f"{one.block} of {one.group} is {one.way} in {one.phase}, and {name} {words}")


def _check_inner(plan: Plan, model: Model) -> None:
    """Hold that a rank's columns read what its rows give: of heads, and of a feed-forward network."""
    cuts = {(cut.module, layer): cut for cut in plan.cuts for layer in cut.layers}
    kinds = {kind.name: kind for kind in model.kinds}
    for one in plan.chosen:
        if one.block == "attention" and one.way == "head":
            _check_heads(one, kinds[one.group], cuts)
    for kind in model.kinds:
        if kind.down is None:
            continue
        for layer in kind.layers:
            downs = cuts[kind.start + kind.down.module, layer].slices
            for weight in kind.gate_up:
                ups = cuts[kind.start + weight.module, layer].slices
                for rank, (up, down) in enumerate(zip(ups, downs, strict=True)):
                    if up.rows is not None and down.columns is not None and up.rows[0] != down.columns:
                        raise InputError(
                            f"rank {rank} of layer {layer}: down reads {down.columns}, and up gives {up.rows[0]}"
                        )


def _check_heads(one: Chosen, kind: Kind, cuts: dict[tuple[str, int], Cut]) -> None:
    bounds = [0, *(last for _, last in one.heads)]
    if [first for first, _ in one.heads] != bounds[:-1] or bounds[-1] != kind.heads:
        raise InputError(f"heads of {one.group} are {one.heads}: the model has 0 to {kind.heads}, each once")
    slices = cuts[kind.start + kind.out.module, kind.layers[0]].slices
    if len(slices) != len(one.heads):
        raise InputError(f"{one.group} has heads of {len(one.heads)} ranks, and there are {len(slices)}")
    for rank, (own, (first, last)) in enumerate(zip(slices, one.heads, strict=True)):
        wanted = (first * kind.value_dim, last * kind.value_dim)
        if own.columns not in (None, wanted):
            raise InputError(f"rank {rank} of {one.group} has heads {first} to {last}, and out reads {own.columns}")


def _blocks(kind: Kind) -> tuple[str, ...]:
    inner = ("experts",) if kind.experts else ("gate_up", "down")
    return ("norm", "qkv", "attention", "out", "ffn_norm", *inner)


def _check_costs(plan: Plan, walked: Walked) -> None:
    pairs = {f"a pass of {name}": (plan.passes.get(name, 0.0), seconds) for name, seconds in walked.passes.items()}
    pairs["a step"] = plan.step, walked.step
    for what, (own, other) in pairs.items():
        if abs(own - other) > TOLERANCE * max(own, other):
            raise InputError(f"{what} takes {own * 1e3:.6f} ms by the plan, and {other * 1e3:.6f} ms by its ranks")
    for number, stage in enumerate(plan.stages):
        for rank, memory in enumerate(stage.memory):
            found = walked.weights[number][rank], walked.kv[number][rank]
            if (memory.weights, memory.kv) != found:
                raise InputError(
                    f"rank {rank} of stage {number} has {found[0]} and {found[1]} bytes of weights and of keys and "
                    f"values, and the plan says {memory.weights} and {memory.kv}"
                )
