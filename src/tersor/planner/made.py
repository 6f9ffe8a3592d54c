"""What is one way to deal out a mesh worth? Its problem is solved, layers are split into stages, memory is held."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from tersor.errors import InputError
from tersor.planner import memory
from tersor.planner.blocks import EMBEDDING, FINAL_NORM, HEAD, MEMORY, SAMPLE, Blocks, Replica
from tersor.planner.links import SEND, Exchange
from tersor.planner.parts import PLAIN_BYTES
from tersor.planner.plan import Memory, Part
from tersor.planner.problem import Choice, Problem
from tersor.planner.search import Found, fast
from tersor.planner.searches import Solve
from tersor.planner.stages import Group, split
from tersor.planner.ways import DECODE, PREFILL, TOKENS, Phase, Setting

LATENCY, THROUGHPUT = "latency", "throughput"
PRODUCTS = ("qkv", "out", "gate_up", "down", "experts", HEAD)


@dataclass(frozen=True)
class Made:
    """One way to deal out a mesh, solved.

    Attributes:
        replica, choice, found: its problem and what was chosen.
        parts: micro-batches of a decode step.
        starts: first item of every stage: items are the embedding, layers, and what comes behind.
        times: of the passes, by part.
        passes: phase -> seconds of a pass through all stages.
        longest: phase -> seconds of the stage that takes longest.
        stage_seconds: of every stage, phase -> seconds.
        step: seconds of a step with its share of prefill.
        bound: that no choice on these axes is below.
        memory: of every stage, of every rank.
    """

    replica: Replica
    choice: Choice
    found: Found
    parts: int
    starts: tuple[int, ...]
    times: tuple[Part, ...]
    passes: dict[str, float]
    longest: dict[str, float]
    stage_seconds: tuple[dict[str, float], ...]
    step: float
    bound: float
    memory: tuple[tuple[Memory, ...], ...]

    @property
    def setting(self) -> Setting:
        """What it was made of."""
        return self.replica.setting

    @property
    def rate(self) -> float:
        """Tokens a second of all devices: drawn ones, or those of prompts where nothing is drawn."""
        axes, workload = self.setting.axes, self.setting.workload
        if DECODE in workload.phases:
            return axes.data * workload.batch / self.step
        return axes.data * workload.prompt / self.longest[PREFILL]

    def value(self, objective: str) -> float:
        """Return what is to be small: seconds of a step, or of a device for a token."""
        return self.step if objective == LATENCY else self.setting.axes.mesh.devices / self.rate


class Unfit(InputError):
    """A way to deal out a mesh cannot hold the model; `lacks` are the bytes that its fullest rank is short of."""

    def __init__(self, text: str, lacks: int) -> None:
        """Take the line and the bytes."""
        super().__init__(text)
        self.lacks = lacks


@dataclass(frozen=True)
class Pool:
    """Problems that were solved where memory does not bind: what a number of stages does not change is solved once.

    Attributes:
        solve: the search.
    """

    solve: Solve
    _solved: dict[object, tuple[Replica, Problem, Found]] = field(default_factory=dict)
    _known: dict[object, Blocks] = field(default_factory=dict)
    _stages: dict[object, float] = field(default_factory=dict)

    def least_stage(self, setting: Setting, parts: int, layers: int, behind: bool) -> float:
        """Return seconds that a stage of so many layers takes of a step at least, all micro-batches together.

        Of one kind of layers; what is ahead of them does not count, and what is behind them if it is said.
        """
        key = *_key(setting, parts), layers, behind
        if key not in self._stages:
            replica, problem, _ = self._solved[_key(setting, parts)]
            whole = len(setting.model.layers)
            inside = {name for name, place in replica.places.items() if place.group == setting.model.kinds[0].name}
            ends = (FINAL_NORM, HEAD, SAMPLE) if behind else ()
            last = {name for name, place in replica.places.items() if place.group in ends}
            blocks = tuple(
                replace(one, seconds=one.seconds * (layers / whole if one.name in inside else float(one.name in last)))
                for one in problem.blocks
            )
            edges = list(problem.edges)
            for number, joint in enumerate(replica.joints):  # their edges are the first ones
                share = layers / whole if joint.count == whole else (layers - 1) / max(1, whole - 1)
                if joint.source not in inside or joint.target not in inside:
                    share = float(joint.target in last)
                seconds = edges[number].seconds
                edges[number] = replace(edges[number], seconds=np.where(np.isfinite(seconds), seconds, 0.0) * share)
                edges[number].seconds[~np.isfinite(seconds)] = np.inf
            self._stages[key] = self.solve(Problem(blocks, tuple(edges), problem.limits)).bound
        return self._stages[key]

    def of(self, setting: Setting, parts: int, room: float) -> tuple[Replica, Problem, Found]:
        """Return the problem of one replica and what was found for it.

        Args:
            setting: the model on its axes.
            parts: micro-batches of a decode step.
            room: bytes of a rank for weights, keys and values.

        Raises:
            InputError: no choice fits.
        """
        key = _key(setting, parts)
        limits = ((MEMORY, room * setting.axes.pipeline),)
        if key not in self._solved:
            replica, problem = Replica.of(setting, parts, math.inf, self._known)
            self._solved[key] = replica, problem, self.solve(problem)
        replica, problem, found = self._solved[key]
        replica, problem = replace(replica, setting=setting), replace(problem, limits=limits)
        if not problem.fits(found.choice):
            found = self.solve(problem)
        return replica, problem, found


def _key(setting: Setting, parts: int) -> tuple[object, ...]:
    """Return what a problem depends on."""
    axes = setting.axes
    return axes.tensor_group, axes.expert, axes.expert_group, parts, axes.pipeline == 1, setting.workload


def make(setting: Setting, parts: int, pool: Pool, beats: Callable[[float], bool] = lambda _: True) -> Made | float:
    """Solve one way to deal out a mesh; where its bound cannot beat the best, return that bound.

    Args:
        setting: the model on its axes.
        parts: micro-batches of a decode step.
        pool: of what was solved.
        beats: whether a step of so many seconds would be better than the best.

    Raises:
        Unfit: it does not fit in memory; the line says what is missing, of which rank.
    """
    phases = memory.phases_of(setting, parts)
    left = memory.room(setting.kernels.chip) - memory.reserve(setting, phases)
    lacks = least_bytes(setting) - left
    if lacks > 0:
        raise Unfit(_short(setting, lacks, "weights, keys and values"), lacks)
    try:
        replica, problem, found = pool.of(setting, parts, float(left))
    except InputError:
        _, problem = Replica.of(setting, parts, float(left))
        lacks = max(1, int(fewest_bytes(problem).seconds - problem.limits[0][1]) // setting.axes.pipeline)
        raise Unfit(_short(setting, lacks, "weights, keys and values"), lacks) from None
    bound = _bound(replica, found, parts)
    if parts > 1 and len(setting.model.kinds) == 1:  # no layer is in two stages
        most = -(-len(setting.model.layers) // setting.axes.pipeline)
        for layers, behind in ((most, False), (1, True)):
            if beats(bound):
                bound = max(bound, pool.least_stage(setting, parts, layers, behind))
    if not beats(bound):
        return bound
    try:
        return replace(weighed(replica, found, parts), bound=bound)
    except Unfit:  # another choice may be held by stages that this one is too large for
        least = fewest_bytes(problem).choice
        return weighed(replica, replace(found, choice=least, seconds=problem.seconds(least)), parts)


def _bound(replica: Replica, found: Found, parts: int) -> float:
    """Return seconds that no choice on these axes takes less of for a step: even stages, and what they send."""
    axes = replica.setting.axes
    sent = 0.0
    for phase in memory.phases_of(replica.setting, parts):
        weight = replica.weights[phase.name] if phase.name != DECODE else 1.0
        if phase.name == DECODE or parts == 1:
            sent += weight * sum(count * hop.seconds for hop, count in _hops(replica, found.choice, phase, least=True))
    return found.bound / (axes.pipeline if parts > 1 else 1) + sent


def weighed(replica: Replica, found: Found, parts: int) -> Made:
    """Return what a choice is worth on its axes, with the best stages for it.

    Raises:
        Unfit: no stages hold it.
    """
    setting, choice = replica.setting, found.choice
    axes, chip = setting.axes, setting.kernels.chip
    phases = memory.phases_of(setting, parts)
    seconds = {name: _items(replica, choice, name) for name in replica.weights}
    busy = [
        sum(replica.weights[name] * seconds[name][item] for name in seconds)
        for item in range(len(setting.model.layers) + 2)
    ]
    sizes = memory.item_bytes(replica, choice)
    most = max(memory.activations(setting, phase, choice, replica) for phase in phases)
    left = memory.room(chip) - memory.buffers(setting) - most - memory.logits(setting, phases)
    # The embedding goes with the first layer, and what is behind the layers with the last one.
    joined = [busy[0] + busy[1], *busy[2:-2], busy[-2] + busy[-1]] if len(busy) > 3 else [sum(busy)]
    held = [[own[0] + own[1], *own[2:-2], own[-2] + own[-1]] if len(own) > 3 else [sum(own)] for own in sizes]
    devices = Group("a stage", (1,), np.array(joined), np.array(held, dtype=np.float64), left)
    try:
        found_stages = split([devices], [axes.pipeline], np.zeros((1, 1, len(joined))), idle=False).stages
    except InputError:
        whole = max(sum(own) for own in sizes)
        lacks = max(1, -(-whole // axes.pipeline) - left)
        raise Unfit(_short(setting, lacks, "weights, keys and values of a stage"), lacks) from None
    starts = [stage.first for stage in found_stages]
    bounds = [*starts, len(setting.model.layers)]
    stages = []
    spans = [(bounds[stage], bounds[stage + 1]) for stage in range(axes.pipeline)]
    for stage, (first, last) in enumerate(spans):
        ends = stage == 0, stage == axes.pipeline - 1
        stages.append(memory.of_stage(replica, choice, phases, sizes, (first, last), ends, chip))
    stage_seconds = []
    for stage, (first, last) in enumerate(spans):
        own = {}
        for name, items in seconds.items():
            total = sum(items[1 + first : 1 + last])
            own[name] = total + (items[0] if stage == 0 else 0.0) + (items[-1] if stage == axes.pipeline - 1 else 0.0)
        stage_seconds.append(own)
    hops = {phase.name: _hops(replica, choice, phase) for phase in phases}
    passes = {
        name: sum(own[name] for own in stage_seconds) + sum(count * sent.seconds for sent, count in hops[name])
        for name in seconds
    }
    longest = {name: max(own[name] for own in stage_seconds) for name in seconds}
    times = [part for name in seconds for part in _times(replica, choice, name, hops[name])]
    return Made(
        replica,
        choice,
        found,
        parts,
        tuple(starts),
        tuple(times),
        passes,
        longest,
        tuple(stage_seconds),
        step_of(passes, longest, replica.weights, parts),
        _bound(replica, found, parts),
        tuple(stages),
    )


def step_of(passes: dict[str, float], longest: dict[str, float], weights: dict[str, float], parts: int) -> float:
    """Return the seconds of a step: all micro-batches once through all stages, and prompts that come meanwhile.

    Args:
        passes, longest: phase -> seconds through all stages, and of the longest stage.
        weights: phase -> passes of it that a step has.
        parts: micro-batches.
    """
    step = 0.0
    if DECODE in passes:
        step = max(passes[DECODE], parts * longest[DECODE])
    if PREFILL in passes:
        # Stages of a full pipeline go on with others' tokens; of an idle one a prompt has to pass all.
        step += weights[PREFILL] * (longest[PREFILL] if parts > 1 else passes[PREFILL])
    return step


def least_bytes(setting: Setting) -> int:
    """Return the bytes of weights, keys and values that the fullest rank has at least, however they are cut."""
    model, axes = setting.model, setting.axes
    kv = sum(
        len(kind.layers)
        * setting.workload.pages_bytes(kind.kv_heads, kind.head_dim)
        / (min(axes.tensor, kind.kv_heads) if setting.served else axes.tensor)
        for kind in model.kinds
    )
    return int((model.nbytes / (axes.tensor * axes.expert) + kv) / axes.pipeline)


def fewest_bytes(problem: Problem) -> Found:
    """Return the choice that takes the fewest bytes; its seconds are those bytes."""
    blocks = tuple(
        replace(one, seconds=np.where(np.isfinite(one.seconds), one.bytes[:, 0], np.inf), bytes=one.bytes[:, :0])
        for one in problem.blocks
    )
    edges = tuple(replace(one, seconds=np.where(np.isfinite(one.seconds), 0.0, np.inf)) for one in problem.edges)
    return fast(Problem(blocks, edges))


def _short(setting: Setting, lacks: int, what: str) -> str:
    chip = setting.kernels.chip
    return (
        f"{setting.axes.words()} cannot hold {setting.model.label}: {what} of a rank lack {lacks / 1e9:.1f} GB beside "
        f"buffers and activations in the {memory.room(chip) / 1e9:.1f} GB of {chip.name}"
    )


def _items(replica: Replica, choice: Choice, phase: str) -> list[float]:
    """Return the seconds of a pass by item: the embedding, every layer with the edge into it, and what is behind."""
    model, places = replica.setting.model, replica.places
    inside = [0.0] * len(model.kinds)
    entering: dict[tuple[str, str], float] = {}
    of_group = {kind.name: number for number, kind in enumerate(model.kinds)}
    ends = {EMBEDDING: 0.0, "behind": 0.0}
    for name, place in places.items():
        if place.phase.name == phase:
            seconds = replica.way(choice, name).timed.seconds
            if place.group in of_group:
                inside[of_group[place.group]] += seconds
            else:
                ends[EMBEDDING if place.group == EMBEDDING else "behind"] += seconds
    for joint in replica.joints:
        source, target = places[joint.source], places[joint.target]
        if source.phase.name != phase:
            continue
        sent = replica.exchange(joint, replica.way(choice, joint.source), replica.way(choice, joint.target))
        seconds = 0.0 if sent is None else sent.seconds
        if target.group not in of_group:
            ends["behind"] += seconds
        elif source.group == target.group and target.block != "norm":
            inside[of_group[target.group]] += seconds
        else:
            key = source.group, target.group
            entering[key] = entering.get(key, 0.0) + seconds
    found, before = [ends[EMBEDDING]], EMBEDDING
    for number in model.layers:
        group = model.kinds[number].name
        found.append(inside[number] + entering.get((before, group), 0.0))
        before = group
    return [*found, ends["behind"]]


def _hops(replica: Replica, choice: Choice, phase: Phase, least: bool = False) -> list[tuple[Exchange, int]]:
    """Return what stages send each other, and how often inside a node and between two; at `least` that in shares."""
    setting = replica.setting
    axes, kind = setting.axes, setting.model.kinds[0]
    nbytes = phase.tokens * setting.model.hidden * PLAIN_BYTES
    if least or replica.way(choice, f"{phase.name}.{kind.name}.norm").reads == TOKENS:
        nbytes = -(-nbytes // setting.ranks)
    far = axes.crossings if axes.pipeline > 1 else 0
    near = axes.pipeline - 1 - far
    pairs = ((near, (2,)), (far, (1, 1)))
    return [(setting.links.exchange(SEND, nbytes, groups), count) for count, groups in pairs if count]


def _times(replica: Replica, choice: Choice, phase: str, hops: list[tuple[Exchange, int]]) -> list[Part]:
    found = []
    for name, place in replica.places.items():
        if place.phase.name == phase:
            timed = replica.way(choice, name).timed
            kind = "products" if place.block in PRODUCTS else "attention" if place.block == "attention" else "small"
            total = place.count * timed.seconds
            found.append(Part(name=name, kind=kind, seconds=total, count=place.count, source=timed.source))
    for joint in replica.joints:
        place = replica.places[joint.source]
        if place.phase.name != phase:
            continue
        sent = replica.exchange(joint, replica.way(choice, joint.source), replica.way(choice, joint.target))
        if sent is not None and sent.seconds:
            tail = "residual" if joint.residual else "sum"
            name = f"{phase}.{tail}.{joint.source.partition('.')[2]}"
            source = f"{sent.words}: {sent.source}"
            found.append(
                Part(name=name, kind="sums", seconds=joint.count * sent.seconds, count=joint.count, source=source)
            )
    for sent, count in hops:
        source = f"{sent.words}: {sent.source}"
        found.append(
            Part(name=f"{phase}.stages", kind="pipeline", seconds=count * sent.seconds, count=count, source=source)
        )
    return found
