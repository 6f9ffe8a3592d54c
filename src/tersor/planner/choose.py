"""Which plan is best? Ways to deal out the mesh, those of the least bound first; what cannot win is not solved.

Outside are data, pipeline, tensor and expert ranks and micro-batches, inside the cuts of every block; then the stages.
A bound of axes is the time to read weights, keys and values in even shares: so how long a search takes grows with the
kinds of layers and with the tensor sizes that are tried, and hardly with devices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tersor.errors import InputError, ShapeError
from tersor.planner import cuts, rules, say, served
from tersor.planner.asked import Asked
from tersor.planner.cost import LAYER
from tersor.planner.links import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, SEND
from tersor.planner.made import LATENCY, THROUGHPUT, Made, Pool, Unfit, make
from tersor.planner.mesh import Axes
from tersor.planner.parts import PLAIN_BYTES, Kind
from tersor.planner.plan import Chosen, Cut, Plan, Rival, Slice, Stage
from tersor.planner.searches import SLOW, search_named
from tersor.planner.ways import DECODE, Phase, Setting

SHOWN = 6
"""Ways to deal out the mesh that are solved at least, the runners-up of a report, where so many fit."""
_EQUAL = 1e-9


@dataclass
class _Tried:
    """What was found so far."""

    pool: Pool
    solved: list[Made] = field(default_factory=list)
    unfit: list[tuple[Axes, Unfit]] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)


def plan(asked: Asked) -> Plan:
    """Search for the best plan.

    Raises:
        InputError: no way to deal out the mesh holds the model (what is missing, of which rank), or a search or an
            objective that is not there.
    """
    if asked.objective not in (LATENCY, THROUGHPUT):
        raise InputError(f"objective {asked.objective!r}: latency or throughput")
    began = time.perf_counter()
    ruled = [one for rule in rules.RULES for one in rule.tried(asked.ruled, asked.mesh, asked.workload)]
    made_rules = [rule for rule in ruled if rule.made is not None]
    warm = min((rule.made.value(asked.objective) for rule in made_rules if rule.made is not None), default=math.inf)
    warm = warm if asked.free else math.inf  # rules go beyond what is searched
    search_named(asked.method if asked.method != "rules" else "fast")
    if asked.method != "rules":
        tried = _searched(replace(asked, method="fast") if asked.method in SLOW else asked, warm)
    else:
        tried = _Tried(Pool(search_named("fast")))
        tried.solved = [rule.made for rule in made_rules if rule.made is not None]
    if not tried.solved:
        raise _nothing_fits(asked, tried, ruled)
    best = min(tried.solved, key=lambda made: _order(made, asked.objective))
    if asked.method in SLOW:
        again = make(best.setting, best.parts, Pool(search_named(asked.method)))
        assert isinstance(again, Made)  # whatever its bound
        best = again
    value = best.value(asked.objective)
    bound = min(value, *tried.bounds) if tried.bounds else 0.0
    searched = time.perf_counter() - began
    rivals = _rivals(best, tried, asked.objective)
    baseline = tuple(_rule_row(rule, best, asked.objective) for rule in ruled)
    return assembled(asked, best, bound, searched, rivals, baseline)


def least_seconds(setting: Setting, parts: int) -> float:
    """Return seconds that no plan on these axes takes less of for a step.

    Of every layer either all weights are read by every rank, or its share of them, and then something is exchanged.
    """
    workload, axes, total = setting.workload, setting.axes, 0.0
    most = -(-len(setting.model.layers) // axes.pipeline)  # layers of the stage that has most, at least
    for name in workload.phases:
        phase = Phase.of(name, workload, parts)
        weight = 1.0 if name == DECODE or len(workload.phases) == 1 else workload.prefills
        each = [(_least_of_layer(setting, kind, phase), len(kind.layers)) for kind in setting.model.kinds]
        layers, longest = sum(seconds * count for seconds, count in each), most * min(each)[0]
        near = setting.links.exchange(SEND, -(-phase.tokens * setting.model.hidden // axes.tensor), (2,)).seconds
        through = layers + (axes.pipeline - 1) * near
        if parts == 1:
            total += weight * through
        elif name == DECODE:
            total += max(through, parts * longest)
        else:
            total += weight * max(layers / axes.pipeline, longest)
    return total


def _least_of_layer(setting: Setting, kind: Kind, phase: Phase) -> float:
    bandwidth, ranks = setting.kernels.chip.bandwidth, setting.ranks
    attention, pages = float(sum(one.nbytes() for one in (*kind.qkv, kind.out))), 0.0
    if phase.name == DECODE:
        length = min(phase.length, kind.window or phase.length)
        pages = float(phase.rows * length * setting.workload.token_bytes(kind.kv_heads, kind.head_dim))
    ffn, spread, width = float(sum(one.nbytes() for one in kind.gate_up)), ranks, kind.ffn
    sent = 0.0
    if kind.experts is not None:
        hit = 1 - (1 - kind.experts.top_k / kind.experts.count) ** (phase.tokens * setting.axes.expert)
        routed = sum(one.nbytes() for one in (*kind.experts.gate_up, kind.experts.down))
        # Some of what experts read is found in L2 (`tune.experts_sm90.CONSTANTS.bandwidth`).
        ffn, spread, width = hit * routed / 1.2, ranks * setting.axes.expert, setting.model.hidden
        if setting.axes.expert > 1:  # tokens are sent to where their experts are, and back
            elements = min(kind.experts.top_k, spread) * -(-phase.tokens // ranks) * width
            there = setting.links.exchange(ALL_TO_ALL, PLAIN_BYTES * elements, setting.axes.expert_group)
            sent, ffn = 2 * there.seconds + ffn / spread / bandwidth, 0.0
    elif kind.down is not None:
        ffn += kind.down.nbytes()
    total = sent + (LAYER if phase.name == DECODE else LAYER / 2)
    least = pages if setting.served else pages / ranks  # rows that are dealt out, by whole weights
    for nbytes, kept, share, channels in (
        (attention + pages, attention + least, ranks, kind.heads * kind.value_dim),
        (ffn, ffn, spread, width),
    ):
        whole, cut = kept / bandwidth, nbytes / share / bandwidth
        total += min(whole, cut + _least_exchange(setting, phase.tokens * min(channels, setting.model.hidden)))
    return total


def _least_exchange(setting: Setting, elements: int) -> float:
    if setting.ranks == 1:
        return 0.0
    nbytes = PLAIN_BYTES * elements
    return min(setting.exchange(one, nbytes).seconds for one in (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL))


def _bound(asked: Asked, axes: Axes, parts: int) -> float:
    return asked.value(axes, least_seconds(asked.setting(axes), parts))


def _searched(asked: Asked, warm: float) -> _Tried:
    """Solve what can win, the least bound first; `warm` is what a rule gives, which a plan has to be no worse than."""
    tried, best = _Tried(Pool(search_named(asked.method))), math.inf
    ranked = sorted(((_bound(asked, *pair), pair) for pair in asked.candidates()), key=lambda one: one[0])
    for bound, (axes, parts) in ranked:
        enough = len({made.setting.axes for made in tried.solved}) >= SHOWN
        if bound >= best and enough:
            tried.bounds.append(bound)
            break
        limit = min(best, warm * (1 + _EQUAL)) if enough else math.inf
        try:
            made = make(
                asked.setting(axes),
                parts,
                tried.pool,
                lambda step, axes=axes, limit=limit: asked.value(axes, step) < limit,  # type: ignore[misc]
            )
        except Unfit as error:
            tried.unfit.append((axes, error))
            continue
        if isinstance(made, float):
            tried.bounds.append(max(bound, asked.value(axes, made)))
            continue
        tried.solved.append(made)
        tried.bounds.append(max(bound, asked.value(axes, made.bound)))
        best = min(best, made.value(asked.objective))
    return tried


def _order(made: Made, objective: str) -> tuple[float, float, int, int]:
    axes = made.setting.axes
    return made.value(objective), -made.rate, axes.tensor * axes.pipeline, made.parts


def _nothing_fits(asked: Asked, tried: _Tried, ruled: Sequence[rules.Ruled]) -> InputError:
    errors = [error for _, error in tried.unfit] + [rule.unfit for rule in ruled if rule.unfit is not None]
    if errors:
        nearest = min(errors, key=lambda error: error.lacks)
        found = notes(
            asked.setting(max((axes for axes, _ in tried.unfit), key=lambda axes: axes.tensor)) if tried.unfit else None
        )
        return InputError(f"no plan fits: {nearest}" + (f"; and {found[0]}" if found else ""))
    words = {"copies": asked.data, "stages": asked.pipeline, "ranks of a stage": asked.tensor}
    asked_for = ", ".join(f"{count} {what}" for what, count in words.items() if count is not None)
    return InputError(
        f"no way to deal out {asked.mesh.devices} devices can be made of {asked.model.label}"
        + (f" with {asked_for}" if asked_for else "")
    )


def _rivals(best: Made, tried: _Tried, objective: str) -> tuple[Rival, ...]:
    of_axes: dict[Axes, Made] = {}
    for made in sorted(tried.solved, key=lambda made: _order(made, objective)):
        of_axes.setdefault(made.setting.axes, made)
    found = [
        Rival(
            name=say.named(made),
            axes=axes.words(),
            seconds=made.step,
            rate=made.rate,
            why=say.why_not(made, best, objective),
        )
        for axes, made in of_axes.items()
        if axes != best.setting.axes
    ][: SHOWN - 1]
    known = set(of_axes)
    smallest = {axes: error for axes, error in tried.unfit if axes not in known and axes.pipeline == 1}
    for axes, error in sorted(smallest.items(), key=lambda pair: -pair[0].tensor)[:1]:
        found.append(Rival(name=axes.words(), axes=axes.words(), seconds=None, rate=None, why=f"{error}"))
    return tuple(found)


def _rule_row(rule: rules.Ruled, best: Made, objective: str) -> Rival:
    if rule.made is None:
        return Rival(name=rule.name, axes=rule.axes.words(), seconds=None, rate=None, why=str(rule.unfit))
    made = rule.made
    same = made.value(objective) <= best.value(objective) * (1 + 1e-12)
    why = "as fast as the plan" if same else say.why_not(made, best, objective)
    return Rival(name=rule.name, axes=made.setting.axes.words(), seconds=made.step, rate=made.rate, why=why)


def assembled(
    asked: Asked, best: Made, bound: float, searched: float, rivals: tuple[Rival, ...], baseline: tuple[Rival, ...]
) -> Plan:
    """Return the plan of one way to deal out a mesh.

    Args:
        asked: what was asked for.
        best: the way.
        bound: that no plan is below, by the objective.
        searched: seconds of the search.
        rivals, baseline: other ways, and plans by rule.
    """
    setting, axes, workload = best.setting, best.setting.axes, asked.workload
    value = best.value(asked.objective)
    found = Plan(
        model=asked.model.label,
        digest=asked.model.digest,
        chip=asked.kernels.chip.name,
        links=asked.links.label,
        mesh=asked.mesh.words(),
        data=axes.data,
        pipeline=axes.pipeline,
        tensor=axes.tensor,
        expert=axes.expert,
        idle=asked.mesh.devices - axes.used,
        workload={
            "batch": workload.batch,
            "context": workload.context,
            "prompt": workload.prompt,
            "kv_bytes": workload.kv_bytes,
            "phases": list(workload.phases),
        },
        objective=asked.objective,
        parts=best.parts,
        stages=_stages(best),
        cuts=_cuts(best),
        chosen=tuple(
            Chosen(
                phase=place.phase.name,
                group=place.group,
                block=place.block,
                way=best.replica.way(best.choice, name).name,
                reads=best.replica.way(best.choice, name).reads,
                gives=best.replica.way(best.choice, name).gives,
                options=len(place.ways),
                heads=best.replica.way(best.choice, name).heads,
            )
            for name, place in best.replica.places.items()
        ),
        times=best.times,
        step=best.step,
        passes=best.passes,
        apart=_apart(asked, best),
        rate=best.rate,
        bound=bound,
        gap=max(0.0, 1 - bound / value) if asked.method != "rules" else 1.0,
        searched=searched,
        method=best.found.method,
        rivals=rivals,
        rules=baseline,
        notes=notes(setting),
        architecture=asked.model.architecture,
    )
    why = served.why_not(found)
    return found if why is None else replace(found, notes=(*found.notes, f"the engine does not run this plan: {why}"))


def _apart(asked: Asked, best: Made) -> dict[str, float]:
    """Return the seconds of a pass of each phase if it alone counted: what it costs that weights have one place."""
    if len(best.passes) < 2 or asked.method == "rules":
        return dict(best.passes)
    found = {}
    for name in best.passes:
        alone = replace(best.setting, workload=replace(asked.workload, phases=(name,)))
        made = make(alone, best.parts, Pool(search_named("fast")))
        assert isinstance(made, Made)  # whatever its bound
        found[name] = made.passes[name]
    return found


def _stages(best: Made) -> tuple[Stage, ...]:
    axes = best.setting.axes
    bounds = [*best.starts, len(best.setting.model.layers)]
    return tuple(
        Stage(
            first=bounds[stage],
            last=bounds[stage + 1],
            embedding=stage == 0,
            head=stage == axes.pipeline - 1,
            devices=axes.devices(0, stage),
            seconds=best.stage_seconds[stage],
            memory=best.memory[stage],
        )
        for stage in range(axes.pipeline)
    )


def _cuts(best: Made) -> tuple[Cut, ...]:
    phase = best.setting.workload.phases[0]
    starts = {kind.name: kind for kind in best.setting.model.kinds}
    found = []
    for name, place in best.replica.places.items():
        if place.phase.name != phase:
            continue
        way, kind = best.replica.way(best.choice, name), starts.get(place.group)
        for pieces in zip(*way.pieces, strict=True):
            weight = pieces[0].weight
            found.append(
                Cut(
                    module=(kind.start if kind else "") + weight.module,
                    layers=kind.layers if kind else (),
                    way=way.name if any(piece != cuts.Piece(weight) for piece in pieces) else "replicate",
                    quantum=weight.quantum,
                    slices=tuple(
                        Slice(rows=piece.part.rows, columns=piece.part.columns, experts=piece.experts)
                        for piece in pieces
                    ),
                    nbytes=tuple(piece.nbytes for piece in pieces),
                    block=name.partition(".")[2],
                )
            )
    return tuple(found)


def notes(setting: Setting | None) -> tuple[str, ...]:
    """Return what could not be cut on these axes, and why."""
    if setting is None or setting.ranks == 1:
        return ()
    found = []
    for kind in setting.model.kinds:
        what = kind.start.format(layer=kind.layers[0])
        try:
            cuts.heads_of(kind, setting.ranks)
        except ShapeError as error:
            found.append(f"attention of {kind.name} is not cut: {error}")
        down = kind.down if kind.experts is None else kind.experts.down
        channels = kind.ffn if kind.experts is None else kind.experts.ffn
        if down is not None:
            try:
                cuts.inner(channels, (down,), setting.ranks, what + down.module)
            except ShapeError as error:
                found.append(f"channels of {kind.name} are not cut: {error}")
    return tuple(found)
