"""What moves take beside the values themselves: copies at another placement, and the buffers of collectives."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from tersor.planner.graph.flows import Flow, ends
from tersor.planner.graph.ir import Graph
from tersor.planner.graph.moves import Moves, Step, held
from tersor.planner.graph.options import Option

BUFFERS = {"all_reduce": 0.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 2.0}
"""Payloads that a collective has beside what it reads and makes: pieces that are received, sent, or both."""


def buffer(steps: tuple[Step, ...]) -> float:
    """Return the bytes of the largest buffer of collectives that run one behind the other."""
    return max((BUFFERS[step.kind] * step.bytes for step in steps), default=0.0)


def moved_bytes(
    graph: Graph,
    flows: Mapping[tuple[str, str], tuple[Flow, ...]],
    chosen: Mapping[str, Option],
    moves: Moves,
) -> list[float]:
    """Return for each operator what moves hold while it runs.

    A copy is there from the first operator that reads a value where the copy is to the last one; the backward pass
    gathers its own. The gradient of a parameter is moved as soon as it is made.
    """
    place = {operator.name: index for index, operator in enumerate(graph.operators)}
    count = len(place)
    lives: dict[object, tuple[int, int, float]] = {}
    buffers = [0.0] * count
    for (source, target), between in flows.items():
        for flow in between:
            value = graph.values[flow.value]
            from_, to = ends(graph, flow, chosen[source], chosen[target])
            steps = moves.between(value.bytes, from_, to, value.parts)
            if not steps:
                continue
            reader = graph.by_name[flow.target] if flow.target else None
            if reader is not None and reader.kind == "update":
                at, size = place[flow.source], held(value.bytes, from_, moves.mesh, value.parts)
            elif reader is None and not flow.source:
                at, size = place[f"update of {flow.value}"], 0.0
            else:
                at = count - 1 if reader is None else place[reader.name]
                size = held(value.bytes, to, moves.mesh, value.parts)
            buffers[at] = max(buffers[at], buffer(steps))
            key = (flow.key, flow.again, from_, to)
            first, last, _ = lives.get(key, (at, at, 0.0))
            lives[key] = (min(first, at), max(last, at), size)
    changes = [0.0] * (count + 1)
    for first, last, size in lives.values():
        changes[first] += size
        changes[last + 1] -= size
    return [copies + most for copies, most in zip(itertools.accumulate(changes[:count]), buffers, strict=True)]
