"""A second cost of a plan: its ranks are walked through every layer, by what the plan's file says that each has.

Nothing is folded and no option is looked up: sizes come from slices, exchanges from layouts. Ranks of a stage wait for
each other behind every block, as the search counts. Prices of a product and of an exchange are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from tersor.layouts.shard import Part
from tersor.planner.cost import Kernels
from tersor.planner.cuts import Piece
from tersor.planner.layer_ways import attended, experts_timed
from tersor.planner.links import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, SEND, Links
from tersor.planner.mesh import Axes, Mesh
from tersor.planner.parts import PLAIN_BYTES, Kind, Model, Weight, Workload
from tersor.planner.plan import Chosen, Plan, Slice
from tersor.planner.ways import BATCH, DECODE, HEAD, PREFILL, Phase, Setting


@dataclass(frozen=True)
class Walked:
    """What the walk gives.

    Attributes:
        passes: phase -> seconds of a pass through all stages.
        step: seconds of a step.
        weights: of every stage, of every rank, bytes of weights with norms and the like.
        kv: likewise, of keys and values.
    """

    passes: dict[str, float]
    step: float
    weights: tuple[tuple[int, ...], ...]
    kv: tuple[tuple[int, ...], ...]


def axes_of(plan: Plan) -> Axes:
    """Return the axes that a plan names."""
    nodes = Mesh.of(None, plan.mesh, 1 << 30)
    return Axes(nodes, plan.data, plan.pipeline, plan.tensor, plan.expert)


def workload_of(plan: Plan) -> Workload:
    """Return the workload that a plan is for."""
    raw = plan.workload
    sizes = {name: int(raw[name]) for name in ("batch", "context", "prompt", "kv_bytes")}
    return Workload(**sizes, phases=tuple(raw["phases"]))


class Walk:
    """A plan, seen from its ranks."""

    def __init__(self, plan: Plan, model: Model, kernels: Kernels, links: Links) -> None:
        """Take a plan, its model and the prices it was made with."""
        self.plan, self.model, self.kernels, self.links = plan, model, kernels, links
        self.setting = Setting(model, axes_of(plan), workload_of(plan), kernels, links)
        self._cuts = {(cut.module, layer): cut for cut in plan.cuts for layer in cut.layers or (-1,)}
        self._chosen = {(one.phase, one.group, one.block): one for one in plan.chosen}

    def walked(self) -> Walked:
        """Walk all passes."""
        workload = self.setting.workload
        passes, longest = {}, {}
        for name in workload.phases:
            phase = Phase.of(name, workload, self.plan.parts)
            stages, between = self._pass(phase)
            passes[name], longest[name] = sum(stages) + between, max(stages)
        step = 0.0
        if DECODE in passes:
            step = max(passes[DECODE], self.plan.parts * longest[DECODE])
        if PREFILL in passes:
            share = workload.prefills if len(workload.phases) > 1 else 1.0
            step += share * (longest[PREFILL] if self.plan.parts > 1 else passes[PREFILL])
        weights, kv = zip(*(self._held(stage) for stage in range(self.plan.pipeline)), strict=True)
        return Walked(passes, step, tuple(weights), tuple(kv))

    def _pass(self, phase: Phase) -> tuple[list[float], float]:
        """Return the seconds of every stage, and of what goes from one to the next."""
        stages, between = [], 0.0
        tokens, hidden = phase.tokens, self.model.hidden
        stream, residual = "R", "R"  # what the block before gave, and the layout of the residual
        crossings = self._crossings()
        for number, stage in enumerate(self.plan.stages):
            total = 0.0
            if stage.embedding:
                own = self._of(phase, "embedding", "embedding")
                total += self.kernels.lookup(tokens, hidden).seconds
                stream, residual = own.gives, "R"
            for layer in range(stage.first, stage.last):
                if layer == stage.first and number:
                    nbytes = tokens * hidden * PLAIN_BYTES
                    first = self._of(phase, self.model.kinds[0].name, "norm")
                    nbytes = -(-nbytes // self.plan.tensor) if first.reads == "S" else nbytes
                    between += self.links.exchange(SEND, nbytes, (1, 1) if crossings[number - 1] else (2,)).seconds
                seconds, stream, residual = self._layer(phase, layer, stream, residual)
                total += seconds
            if stage.head:
                total += self._behind(phase, stream, residual)
            stages.append(total)
        return stages, between

    def _crossings(self) -> list[bool]:
        """Return for every boundary whether its stages stand in different nodes, of the replica where most do."""
        axes = self.setting.axes
        starts = [sum(axes.mesh.nodes[: node + 1]) for node in range(len(axes.mesh.nodes))]

        def node(device: int) -> int:
            return next(number for number, end in enumerate(starts) if device < end)

        found = []
        for replica in range(min(axes.data, 64)):
            devices = [axes.devices(replica, stage) for stage in range(axes.pipeline)]
            found.append([node(one[-1]) != node(other[0]) for one, other in pairwise(devices)])
        return max(found, key=sum)

    def _layer(self, phase: Phase, layer: int, stream: str, residual: str) -> tuple[float, str, str]:
        kind = self.model.kinds[self.model.layers[layer]]
        total, blocks = 0.0, ["norm", "qkv", "attention", "out", "ffn_norm"]
        blocks += ["experts"] if kind.experts else ["gate_up", "down"]
        heads = sum(weight.oc for weight in kind.qkv)
        width = {"qkv": self.model.hidden, "attention": heads, "out": kind.heads * kind.value_dim, "down": kind.ffn}
        for block in blocks:
            own = self._of(phase, kind.name, block)
            nbytes = phase.tokens * width.get(block, self.model.hidden) * PLAIN_BYTES
            total += self._turned(stream, own.reads, nbytes)
            if block in ("norm", "ffn_norm"):
                total += self._gathered(residual, own.reads, nbytes)
                residual = own.gives
            total += max(self._block(phase, kind, layer, own, rank) for rank in range(self.plan.tensor))
            stream = own.gives
        return total, stream, residual

    def _behind(self, phase: Phase, stream: str, residual: str) -> float:
        hidden, rows = self.model.hidden, phase.rows
        norm, head, drawn = (self._of(phase, name, name) for name in ("final_norm", "head", "sample"))
        nbytes = phase.tokens * hidden * PLAIN_BYTES
        total = self._turned(stream, norm.reads, nbytes) + self._gathered(residual, norm.reads, nbytes)
        total += self._norm(phase.tokens, norm)
        total += self._turned(norm.gives, head.reads, rows * hidden * PLAIN_BYTES)
        weight = self.model.out
        total += max(
            self.setting.product((self._piece(weight.module, -1, weight, rank),), rows).seconds
            for rank in range(self.plan.tensor)
        )
        total += self._turned(head.gives, drawn.reads, rows * self.model.vocabulary * PLAIN_BYTES)
        return total + self.kernels.sample(rows, self.model.vocabulary).seconds

    def _block(self, phase: Phase, kind: Kind, layer: int, own: Chosen, rank: int) -> float:
        tokens = -(-phase.tokens // self.plan.tensor) if own.reads == "S" and self.plan.tensor > 1 else phase.tokens
        if own.block in ("norm", "ffn_norm"):
            return self._norm(phase.tokens, own)
        if own.block == "attention":
            rows = self._rows(phase.rows) if own.way == BATCH and phase.name == DECODE else phase.rows
            return attended(self.setting, kind, replace(phase, rows=rows), *self._heads(kind, phase.name, rank)).seconds
        pieces = tuple(self._piece(kind.start + one.module, layer, one, rank) for one in _weights(kind, own.block))
        if own.block != "experts":
            return self.setting.product(pieces, tokens).seconds
        assert kind.experts is not None
        if self.plan.expert == 1:
            return experts_timed(self.setting, kind.experts, pieces, phase.tokens).seconds
        spread, ranks = self.plan.expert, self.plan.expert * self.plan.tensor
        timed = experts_timed(self.setting, kind.experts, pieces, phase.tokens * spread, tokens, ranks)
        nbytes = min(kind.experts.top_k, ranks) * tokens * self.model.hidden * PLAIN_BYTES
        return timed.seconds + 2 * self.links.exchange(ALL_TO_ALL, nbytes, self.setting.axes.expert_group).seconds

    def _heads(self, kind: Kind, phase: str, rank: int) -> tuple[int, int]:
        """Return how many query heads a rank has, and how many heads of keys they read."""
        own = self._chosen[phase, kind.name, "attention"]
        first, last = own.heads[rank] if own.way == HEAD else (0, kind.heads)
        ratio = kind.heads // kind.kv_heads
        return last - first, -(-last // ratio) - first // ratio

    def _rows(self, rows: int) -> int:
        """Return the most rows that a rank has where they are dealt out one by one."""
        return len(range(0, rows, self.plan.tensor))

    def _kept(self, kind: Kind) -> int:
        """Return the rows whose pages a rank has in a layer: all, or those of its attention."""
        workload = self.setting.workload
        phase = Phase.of(workload.phases[0], workload, self.plan.parts)
        if self._of(phase, kind.name, "attention").way != BATCH:
            return workload.batch
        rows = phase.rows if phase.name == DECODE else workload.batch
        return sum(self._rows(rows) for _ in range(0, workload.batch, rows))

    def _norm(self, tokens: int, own: Chosen) -> float:
        each = -(-tokens // self.plan.tensor) if own.way == "sequence" else tokens
        return self.kernels.norm(each, self.model.hidden).seconds

    def _turned(self, gives: str, reads: str, nbytes: int) -> float:
        if gives in (reads, "R"):
            return 0.0
        if gives == "P":
            operation = ALL_REDUCE if reads == "R" else REDUCE_SCATTER
        else:
            operation = ALL_GATHER if reads == "R" else ALL_TO_ALL
        return self.links.exchange(operation, nbytes, self.setting.axes.tensor_group).seconds

    def _gathered(self, residual: str, reads: str, nbytes: int) -> float:
        return self._turned("S", "R", nbytes) if residual == "S" and reads != "S" else 0.0

    def _piece(self, module: str, layer: int, weight: Weight, rank: int) -> Piece:
        cut = self._cuts[module, layer]
        return Piece(weight, *_part(cut.slices[rank]))

    def _of(self, phase: Phase, group: str, block: str) -> Chosen:
        return self._chosen[phase.name, group, block]

    def _held(self, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the bytes of weights, and of keys and values, of every rank of a stage."""
        stage, phase = self.plan.stages[number], self.setting.workload.phases[0]
        weights, kv = [0] * self.plan.tensor, [0] * self.plan.tensor
        for rank in range(self.plan.tensor):
            for layer in range(stage.first, stage.last):
                kind = self.model.kinds[self.model.layers[layer]]
                weights[rank] += PLAIN_BYTES * kind.vectors
                weights[rank] += sum(
                    self._piece(kind.start + one.module, layer, one, rank).nbytes for one in kind.weights()
                )
                keys = self._heads(kind, phase, rank)[1]
                kv[rank] += self.setting.workload.pages_bytes(keys, kind.head_dim, self._kept(kind))
            ends = [self.model.embedding] if stage.embedding else []
            if stage.head:
                weights[rank] += PLAIN_BYTES * self.model.vectors
                if self.model.head is not None or not stage.embedding:
                    ends.append(self.model.out)
            weights[rank] += sum(self._piece(one.module, -1, one, rank).nbytes for one in ends)
        return tuple(weights), tuple(kv)


def _weights(kind: Kind, block: str) -> tuple[Weight, ...]:
    experts = kind.experts
    routed = () if experts is None else (experts.router, *experts.gate_up, experts.down, *experts.shared)
    downs = () if kind.down is None else (kind.down,)
    of = {"qkv": (*kind.whole, *kind.qkv), "out": (kind.out,), "gate_up": kind.gate_up, "down": downs}
    return of.get(block, routed)


def _part(own: Slice) -> tuple[Part, tuple[int, int] | None]:
    return Part(own.rows, own.columns), own.experts
