"""The problem of one replica: every kind of layer once, with as many times its costs as there are layers of it.

An edge turns the layout that one block gives into that which the next one reads. The last block of a layer has an edge
to the first one of the next layer; where that is of the same kind, the edge leads back and is turned round. Residuals
are carried in the layout of the norms. Phases have blocks of their own, and weights one place: edges of infinite cost
forbid that they differ. So they do where the engine is to run a plan, and has layers cut alike (`served`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from tersor.planner.layer_ways import of_layer
from tersor.planner.links import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, NOTHING, REDUCE_SCATTER, Exchange
from tersor.planner.parts import PLAIN_BYTES
from tersor.planner.problem import Block, Choice, Edge, Problem
from tersor.planner.served import INSIDE, TOGETHER, WAYS
from tersor.planner.ways import (
    ALL,
    DECODE,
    PENDING,
    TOKENS,
    Phase,
    Setting,
    Way,
    embedding,
    head,
    norms,
    sample,
)

EMBEDDING, FINAL_NORM, HEAD, SAMPLE = "embedding", "final_norm", "head", "sample"
MEMORY = "weights and keys and values of a replica"
Blocks = list[tuple[str, list[Way], int]]
"""The blocks of a layer: name, ways, and channels of what the block gives."""


def converted(setting: Setting, gives: str, reads: str, nbytes: int) -> Exchange | None:
    """Return what it takes to turn a layout into another one; `None` where that cannot be.

    Args:
        setting: the axes and links.
        gives, reads: layouts.
        nbytes: of the whole, or of one addend.
    """
    if gives in (reads, ALL):
        return None if reads == PENDING and gives != reads else NOTHING
    if reads == PENDING:
        return None
    if gives == PENDING:
        return setting.exchange(ALL_REDUCE if reads == ALL else REDUCE_SCATTER, nbytes)
    return setting.exchange(ALL_GATHER if reads == ALL else ALL_TO_ALL, nbytes)


@dataclass(frozen=True)
class Place:
    """A block of the problem.

    Attributes:
        name: in the problem, such as `decode.layers.0-79.qkv`.
        group: `layers.0-79`, or the block's own name outside layers.
        block: its name in the layer.
        count: layers that have it.
        ways: its options.
        phase: what it computes.
    """

    name: str
    group: str
    block: str
    count: int
    ways: list[Way]
    phase: Phase


@dataclass(frozen=True)
class Joint:
    """An edge that costs something: `count` exchanges of `nbytes` from one block to another.

    Attributes:
        source, target: names of blocks, in the order of computing.
        count: how often in a pass.
        nbytes: the payload.
        residual: whether it carries the residual stream, whose layout is that of the norms.
    """

    source: str
    target: str
    count: int
    nbytes: int
    residual: bool = False


@dataclass(frozen=True)
class Replica:
    """The problem of one replica, and what it was made of.

    Attributes:
        setting: the model, axes and prices.
        weights: phase -> how many of its passes count for a step.
        places: name -> block, in order.
        joints: what is exchanged.
        problem: for a search.
    """

    setting: Setting
    weights: dict[str, float]
    places: dict[str, Place] = field(default_factory=dict)
    joints: list[Joint] = field(default_factory=list)
    _shared: list[tuple[str, str]] = field(default_factory=list)
    _tied: list[tuple[str, str]] = field(default_factory=list)

    @staticmethod
    def of(
        setting: Setting, parts: int, room: float, known: dict[object, Blocks] | None = None
    ) -> tuple[Replica, Problem]:
        """Return the problem of one replica on its axes.

        Args:
            setting: the model, axes and prices.
            parts: micro-batches of a decode step.
            room: bytes of a rank for weights, keys and values.
            known: ways that were made already of the same model, by what they depend on; more are added.
        """
        workload = setting.workload
        both = len(workload.phases) > 1
        weights = {name: (parts if name == DECODE else workload.prefills if both else 1.0) for name in workload.phases}
        found = Replica(setting, weights)
        for name in workload.phases:
            found._phase(Phase.of(name, workload, parts), {} if known is None else known)
        return found, found._problem(room * setting.axes.pipeline)

    def way(self, choice: Choice, name: str) -> Way:
        """Return the way that a choice has for a block."""
        return self.places[name].ways[choice[name]]

    def exchange(self, joint: Joint, source: Way, target: Way) -> Exchange | None:
        """Return what one exchange takes between two ways; `None` where they cannot follow each other."""
        if self.setting.served and source.gives != target.reads and {source.gives, target.reads} & set(INSIDE):
            return None
        if joint.residual and (source.gives != TOKENS or target.gives == TOKENS):
            return NOTHING
        return converted(self.setting, source.gives, target.reads, joint.nbytes)

    def _phase(self, phase: Phase, known: dict[object, Blocks]) -> None:
        setting, model = self.setting, self.setting.model
        axes = setting.axes
        key = phase, axes.tensor_group, axes.expert, axes.expert_group, setting.workload
        stream = phase.tokens * model.hidden * PLAIN_BYTES
        self._add(phase, EMBEDDING, EMBEDDING, 1, embedding(setting, phase))
        firsts, lasts, ffn_norms = [], [], []
        for kind in model.kinds:
            names, widths = [], []
            if (kind.layers, key) not in known:
                known[kind.layers, key] = list(of_layer(setting, kind, phase))
            for block, ways, channels in known[kind.layers, key]:
                names.append(self._add(phase, kind.name, block, len(kind.layers), ways))
                widths.append(channels)
            for (source, target), channels in zip(pairwise(names), widths, strict=False):
                nbytes = phase.tokens * channels * PLAIN_BYTES
                self.joints.append(Joint(source, target, len(kind.layers), nbytes))
            self.joints.append(Joint(names[0], names[4], len(kind.layers), stream, residual=True))
            firsts.append(names[0])
            lasts.append(names[-1])
            ffn_norms.append(names[4])
        final = self._add(phase, FINAL_NORM, FINAL_NORM, 1, norms(setting, phase.tokens))
        layers, prefix = model.layers, f"{phase.name}."
        self.joints.append(Joint(prefix + EMBEDDING, firsts[layers[0]], 1, stream))
        for (before, after), count in Counter(pairwise(layers)).items():
            self.joints.append(Joint(lasts[before], firsts[after], count, stream))
            self.joints.append(Joint(ffn_norms[before], firsts[after], count, stream, residual=True))
        self.joints.append(Joint(lasts[layers[-1]], final, 1, stream))
        self.joints.append(Joint(ffn_norms[layers[-1]], final, 1, stream, residual=True))
        read = self._add(phase, HEAD, HEAD, 1, head(setting, phase))
        self.joints.append(Joint(final, read, 1, phase.rows * model.hidden * PLAIN_BYTES))
        drawn = self._add(phase, SAMPLE, SAMPLE, 1, sample(setting, phase))
        self.joints.append(Joint(read, drawn, 1, phase.rows * model.vocabulary * PLAIN_BYTES))
        if model.head is None and setting.axes.pipeline == 1:
            self._shared.append((prefix + EMBEDDING, read))
        elif setting.served and setting.axes.pipeline == 1:
            self._tied.append((prefix + EMBEDDING, read))
        if setting.served:
            for block in (together[0] for together in TOGETHER):
                own = [f"{prefix}{kind.name}.{block}" for kind in model.kinds]
                self._tied.extend(pairwise(name for name in own if name in self.places))

    def _add(self, phase: Phase, group: str, block: str, count: int, ways: list[Way]) -> str:
        name = f"{phase.name}.{group}" if group == block else f"{phase.name}.{group}.{block}"
        if self.setting.served:
            ways = [way for way in ways if way.name in WAYS[block]]
        self.places[name] = Place(name, group, block, count, ways, phase)
        return name

    def held_bytes(self, name: str) -> bool:
        """Whether the bytes of a block's weights count: once, whatever reads them."""
        return not any(name == target for _, target in self._shared)

    def _problem(self, room: float) -> Problem:
        first = next(iter(self.weights))
        blocks = []
        of_phase = {name: [one for one in self.places.values() if one.phase.name == name] for name in self.weights}
        # Phases side by side: who eliminates blocks in order has few of them at once, however many kinds there are.
        for place in (one for alike in zip(*of_phase.values(), strict=True) for one in alike):
            weight = self.weights[place.phase.name] * place.count
            seconds = np.array([weight * way.timed.seconds for way in place.ways])
            counted = place.phase.name == first and self.held_bytes(place.name)
            sizes = np.array([[float(place.count * way.bytes * counted)] for way in place.ways])
            blocks.append(Block(place.name, tuple(way.name for way in place.ways), seconds, sizes))
        order = {block.name: number for number, block in enumerate(blocks)}
        edges = []
        for joint in self.joints:
            source, target = self.places[joint.source], self.places[joint.target]
            weight = self.weights[source.phase.name] * joint.count
            matrix = np.full((len(source.ways), len(target.ways)), np.inf)
            for row, one in enumerate(source.ways):
                for column, other in enumerate(target.ways):
                    found = self.exchange(joint, one, other)
                    if found is not None:
                        matrix[row, column] = weight * found.seconds
            edges += self._edge(order, joint.source, joint.target, matrix)
        alike = (*self._shared, *self._tied, *self._phases())
        edges += [edge for pair in alike for edge in self._alike(order, *pair)]
        return Problem(tuple(blocks), tuple(edges), ((MEMORY, room),))

    def _phases(self) -> list[tuple[str, str]]:
        names = list(self.weights)
        return [
            (f"{names[0]}.{name.partition('.')[2]}", name)
            for name, place in self.places.items()
            if place.phase.name != names[0] and any(way.held for way in place.ways)
        ]

    def _alike(self, order: dict[str, int], source: str, target: str) -> list[Edge]:
        ways = self.places[source].ways, self.places[target].ways
        matrix = np.array([[0.0 if one.held == other.held else np.inf for other in ways[1]] for one in ways[0]])
        return self._edge(order, source, target, matrix)

    def _edge(self, order: dict[str, int], source: str, target: str, matrix: np.ndarray) -> list[Edge]:  # type: ignore[type-arg]
        if order[source] < order[target]:
            return [Edge(source, target, matrix)]
        return [Edge(target, source, matrix.T)]
