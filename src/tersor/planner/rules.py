"""What do others do by rule? Baselines at the same costs, and where a search may begin.

- `all tensor`: vLLM's documented rule. One device where it fits, else all of a node, and stages over nodes.
- `redco`: Redco's two rules (arXiv 2310.16355) and its names: queries, keys, values, gate and up by output, `out` and
  down by input, embedding and head by tokens; only what divides evenly, else replicated.
- `model's own`: what transformers ships as `base_model_tp_plan`, where it has one.
- `bytes only`: of all choices that of the fewest bytes exchanged, as Rhino's integer programme counts them (TePDist,
  `cost_spmd_strategy`), on the smallest power of two that fits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tersor.errors import ShapeError
from tersor.planner import memory
from tersor.planner.blocks import Replica
from tersor.planner.made import Made, Unfit, least_bytes, weighed
from tersor.planner.mesh import Axes, Mesh
from tersor.planner.parts import Workload
from tersor.planner.problem import Block, Choice, Edge, Problem
from tersor.planner.search import Found, fast
from tersor.planner.served import under_way
from tersor.planner.ways import COLUMN, HEAD, REPLICATE, ROW, TENSOR, VOCAB, Setting

Settings = Callable[[Axes], Setting]
MEGATRON = {
    "qkv": COLUMN,
    "attention": HEAD,
    "out": ROW,
    "gate_up": COLUMN,
    "down": ROW,
    "experts": TENSOR,
    "embedding": VOCAB,
    "head": VOCAB,
}
"""Block -> way of Megatron-LM (arXiv 1909.08053, section 3)."""


@dataclass(frozen=True)
class Ruled:
    """What a rule gives: its plan, or why it has none."""

    name: str
    axes: Axes
    made: Made | None
    unfit: Unfit | None = None


@dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
        name: what it is called.
        tensors: sizes of a tensor group that it tries, in order, of a mesh; the first that fits counts.
        ways: block -> way, of a setting; what is not named is replicated.
    """

    name: str
    tensors: Callable[[Mesh], Sequence[int]]
    ways: Callable[[Setting], dict[str, str] | None]

    def tried(self, settings: Settings, mesh: Mesh, workload: Workload) -> Iterator[Ruled]:
        """Yield the one plan of the rule, or why there is none; nothing where the rule does not apply."""
        last: Ruled | None = None
        for tensor in self.tensors(mesh):
            groups = len(mesh.groups(tensor))
            for pipeline in dict.fromkeys((1, min(len(mesh.nodes), groups))):
                axes = Axes(mesh, groups // pipeline, pipeline, tensor)
                setting = settings(axes)
                ways = self.ways(setting)
                if ways is None:
                    return
                try:
                    made = by_ways(setting, ways, under_way(pipeline, workload.batch, workload.phases), self.name)
                except Unfit as error:
                    last = Ruled(self.name, axes, None, error)
                    continue
                except ShapeError:
                    continue
                yield Ruled(self.name, axes, made)
                return
        if last is not None:
            yield last


def by_ways(setting: Setting, ways: dict[str, str], parts: int, name: str) -> Made:
    """Return what blocks cut in these ways are worth, each replicated where it cannot be cut so or is not named.

    Raises:
        Unfit: a rank does not hold its part.
    """
    replica, _, problem = _problem(setting, parts)
    if ways is _BYTES:
        choice = fast(_bytes_only(replica, problem)).choice
    else:
        choice = Choice({place: _place(replica, place, ways) for place in replica.places})
        if not np.isfinite(problem.seconds(choice)):  # what one block cannot, the next one does not
            choice = Choice(dict.fromkeys(replica.places, 0))
    return weighed(replica, Found(choice, problem.seconds(choice), 0.0, 0.0, name), parts)


def _problem(setting: Setting, parts: int) -> tuple[Replica, float, Problem]:
    left = memory.room(setting.kernels.chip) - memory.reserve(setting, memory.phases_of(setting, parts))
    lacks = least_bytes(setting) - left
    if lacks > 0:
        raise Unfit(
            f"{setting.axes.words()} cannot hold {setting.model.label}: a rank lacks {lacks / 1e9:.1f} GB", lacks
        )
    replica, problem = Replica.of(setting, parts, float(left))
    return replica, left, problem


def _place(replica: Replica, name: str, ways: dict[str, str]) -> int:
    place = replica.places[name]
    wanted = ways.get(place.block, REPLICATE)
    return next((number for number, way in enumerate(place.ways) if way.name == wanted), 0)


def _powers(mesh: Mesh) -> list[int]:
    return [size for size in mesh.sizes(mesh.devices) if size & (size - 1) == 0]


def _one_or_node(mesh: Mesh) -> list[int]:
    return list(dict.fromkeys((1, max(mesh.nodes))))


def _node(mesh: Mesh) -> list[int]:
    return [max(mesh.nodes)]


def _all_tensor(setting: Setting) -> dict[str, str]:
    return MEGATRON


def _redco(setting: Setting) -> dict[str, str]:
    """Return Redco's ways; dimensions that the ranks do not divide stay whole."""
    ranks, found = setting.ranks, dict(MEGATRON)
    for kind in setting.model.kinds:
        if kind.heads % ranks or kind.kv_heads % ranks:
            for block in ("qkv", "attention", "out"):
                found.pop(block, None)
        channels = kind.ffn if kind.experts is None else kind.experts.ffn
        if channels % ranks:
            for block in ("gate_up", "down", "experts"):
                found.pop(block, None)
    if setting.model.vocabulary % ranks:
        found.pop("embedding", None)
        found.pop("head", None)
    return found


_STYLES = {
    "colwise": COLUMN,
    "rowwise": ROW,
    "colwise_gather_output": COLUMN,
    "rowwise_split_input": ROW,
}


def _own(setting: Setting) -> dict[str, str] | None:
    """Return the ways of the model's own plan; `None` where it has none. What it does not name is replicated."""
    own = setting.model.own_plan
    if not own:
        return None
    found: dict[str, str] = {}
    kind = setting.model.kinds[0]
    downs = (kind.down,) if kind.down else ()
    for block, weights in {"qkv": kind.qkv, "out": (kind.out,), "gate_up": kind.gate_up, "down": downs}.items():
        for weight in weights:
            style = _style(own, kind.start.format(layer=0) + weight.module)
            if style in _STYLES:
                found[block] = _STYLES[style]
            if block == "qkv" and style == "colwise":  # heads stay where they are made
                found["attention"] = HEAD
    if any("expert" in pattern for pattern, _ in own):
        found["experts"] = TENSOR
    if any(style == "embedding_rowwise" for _, style in own):
        found["embedding"] = VOCAB
    return found


def _style(own: tuple[tuple[str, str], ...], module: str) -> str:
    for pattern, style in own:
        words = re.escape(pattern).replace(r"\*", r"\d+")
        if re.search(rf"(^|\.){words}$", module):
            return style
    return ""


_BYTES: dict[str, str] = {}


def _bytes(setting: Setting) -> dict[str, str]:
    return _BYTES


def _bytes_only(replica: Replica, problem: Problem) -> Problem:
    """Return the problem whose seconds are the bytes that are exchanged, and nothing else."""
    blocks = tuple(
        Block(one.name, one.options, np.where(np.isfinite(one.seconds), 0.0, np.inf), one.bytes)
        for one in problem.blocks
    )
    # A finite edge that takes time takes bytes: in proportion to the payload, twice for a sum.
    payload = {frozenset((joint.source, joint.target)): joint for joint in replica.joints}
    edges = []
    for edge in problem.edges:
        joint = payload.get(frozenset((edge.source, edge.target)))
        seconds = edge.seconds
        if joint is not None:
            factor = float(joint.count * joint.nbytes)
            seconds = np.where(np.isfinite(seconds), np.where(seconds > 0, factor, 0.0), np.inf)
        edges.append(Edge(edge.source, edge.target, seconds))
    return Problem(blocks, tuple(edges), problem.limits)


RULES = (
    Rule("all tensor", _one_or_node, _all_tensor),
    Rule("redco", _node, _redco),
    Rule("model's own", _node, _own),
    Rule("bytes only", _powers, _bytes),
)
"""All of them."""
