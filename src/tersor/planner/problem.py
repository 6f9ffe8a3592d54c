"""One option for each block of a model, at the least time, within memory: what every search of the planner solves.

A front end makes a `Problem` of a model, a mesh and a workload; a search returns a `Choice`. Neither knows the other,
so all searches are compared on the same costs (the formulation of Alpa, arXiv 2201.12023, section 4: a vector of costs
for a block, a matrix for an edge; here with several limits of memory).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Choice = NewType("Choice", Mapping[str, int])  # index of the chosen option, by the block's name


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Operators that are cut as one, and the ways to cut them.

    Attributes:
        name: unique in the problem.
        options: a name for each way, such as "column" or "replicate".
        seconds: [options], what the block takes in a step of the critical path; infinity where a way is impossible.
        bytes: [options, limits], what it takes of each limit of the problem, on the rank that needs most.
        tie: blocks with one tie get the same option ("" ties nothing): equal layers, and weights that are shared.
    """

    name: str
    options: tuple[str, ...]
    seconds: Floats
    bytes: Floats
    tie: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """What it takes to hand a result from one block to another, for each pair of options.

    Attributes:
        source: name of the block that makes it.
        target: name of the block that reads it.
        seconds: [options of source, options of target]; infinity where the pair is impossible.
    """

    source: str
    target: str
    seconds: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Blocks in an order in which every edge leads forward, edges, and limits.

    Attributes:
        blocks: the blocks.
        edges: between two blocks there may be several.
        limits: name and bytes of each limit of memory, such as what a rank holds when a certain block runs.
    """

    blocks: tuple[Block, ...]
    edges: tuple[Edge, ...]
    limits: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Check names, shapes and the order of blocks: a wrong problem is a fault of the front end that made it."""
        places = {block.name: place for place, block in enumerate(self.blocks)}
        assert len(places) == len(self.blocks), "two blocks have one name"
        for block in self.blocks:
            count = len(block.options)
            assert count and block.seconds.shape == (count,), f"{block.name}: {count} options"
            assert block.bytes.shape == (count, len(self.limits)), f"{block.name}: bytes are {block.bytes.shape}"
        for edge in self.edges:
            source, target = self.blocks[places[edge.source]], self.blocks[places[edge.target]]
            assert places[edge.source] < places[edge.target], f"{edge.source} is not ahead of {edge.target}"
            assert edge.seconds.shape == (len(source.options), len(target.options)), f"{edge.source} to {edge.target}"

    def seconds(self, choice: Choice) -> float:
        """What a step takes with these options."""
        blocks = sum(float(block.seconds[choice[block.name]]) for block in self.blocks)
        return blocks + sum(float(edge.seconds[choice[edge.source], choice[edge.target]]) for edge in self.edges)

    def bytes(self, choice: Choice) -> Floats:
        """[limits], what these options take of each limit."""
        total = np.zeros(len(self.limits))
        for block in self.blocks:
            total += block.bytes[choice[block.name]]
        return total

    def fits(self, choice: Choice) -> bool:
        """Whether no limit is exceeded and every tie is kept."""
        options: dict[str, int] = {}
        tied = all(
            options.setdefault(block.tie, choice[block.name]) == choice[block.name]
            for block in self.blocks
            if block.tie
        )
        return tied and all(taken <= limit for taken, (_, limit) in zip(self.bytes(choice), self.limits, strict=True))
