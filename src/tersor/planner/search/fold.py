"""Equal layers become one: a problem in numbers alone, with a node for each tie, and the way back.

Time of a search grows with the kinds of layers, not with their number (the idea of TAP, arXiv 2302.00247). Tied blocks
are a node that takes the sum of their seconds and bytes; edges between two of them stand on its diagonal, so that they
are seconds of its options; edges between nodes add up to one matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tersor.planner.problem import Choice, Floats, Problem

Options = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A problem without ties: nodes with options, and at most one edge between two of them.

    Attributes:
        seconds: of every node [options].
        bytes: of every node [options, limits].
        edges: (node, node) -> [options, options], the first node before the second.
        limits: name and bytes.
        blocks: names of the problem's blocks, in its order.
        places: the node that each block is in.
        members: of each block, its own option for every option of its node [options of the node].
    """

    seconds: tuple[Floats, ...]
    bytes: tuple[Floats, ...]
    edges: Mapping[tuple[int, int], Floats]
    limits: tuple[tuple[str, float], ...]
    blocks: tuple[str, ...]
    places: tuple[int, ...]
    members: tuple[Options, ...]

    @property
    def sizes(self) -> list[int]:
        """How many options every node has."""
        return [len(seconds) for seconds in self.seconds]

    @property
    def room(self) -> Floats:
        """[limits], bytes of each limit."""
        return np.array([limit for _, limit in self.limits], dtype=np.float64)

    def choice(self, options: Sequence[int] | Options) -> Choice:
        """Return the option of every block, of that of every node."""
        each = zip(self.blocks, self.places, self.members, strict=True)
        return Choice({name: int(own[options[node]]) for name, node, own in each})

    def evaluate(self, options: Options) -> tuple[Floats, Floats]:
        """Return what plans take: seconds [plans] and bytes [plans, limits], of options [plans, nodes]."""
        seconds = np.zeros(len(options))
        nbytes = np.zeros((len(options), len(self.limits)))
        for node, (own, taken) in enumerate(zip(self.seconds, self.bytes, strict=True)):
            seconds += own[options[:, node]]
            nbytes += taken[options[:, node]]
        for (one, other), matrix in self.edges.items():
            seconds += matrix[options[:, one], options[:, other]]
        return seconds, nbytes


def untied(problem: Problem, keep: Collection[str] = ()) -> Problem:
    """Return the problem without ties but those of these names: every layer may choose for itself."""
    blocks = tuple(block if block.tie in keep else replace(block, tie="") for block in problem.blocks)
    return replace(problem, blocks=blocks)


def fold(problem: Problem) -> Graph:
    """Return the problem with a node for each tie, and one for each block that nothing ties."""
    nodes: dict[tuple[bool, str], int] = {}
    places, seconds, nbytes = [], list[Floats](), list[Floats]()
    for block in problem.blocks:
        key = (bool(block.tie), block.tie or block.name)
        place = nodes.setdefault(key, len(nodes))
        places.append(place)
        if place == len(seconds):
            seconds.append(block.seconds.astype(np.float64))
            nbytes.append(block.bytes.astype(np.float64))
        else:
            assert len(block.options) == len(seconds[place]), f"{block.name}: other options than its tie {block.tie}"
            seconds[place] = seconds[place] + block.seconds
            nbytes[place] = nbytes[place] + block.bytes
    of = {block.name: place for block, place in zip(problem.blocks, places, strict=True)}
    edges: dict[tuple[int, int], Floats] = {}
    for edge in problem.edges:
        one, other = of[edge.source], of[edge.target]
        if one == other:
            seconds[one] = seconds[one] + edge.seconds.diagonal()
            continue
        pair, matrix = ((one, other), edge.seconds) if one < other else ((other, one), edge.seconds.T)
        edges[pair] = edges[pair] + matrix if pair in edges else matrix.astype(np.float64)
    names = tuple(block.name for block in problem.blocks)
    members = tuple(np.arange(len(block.options)) for block in problem.blocks)
    return Graph(tuple(seconds), tuple(nbytes), edges, problem.limits, names, tuple(places), members)
