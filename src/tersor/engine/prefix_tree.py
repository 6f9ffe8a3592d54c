"""Which prompts begin alike, over all levels? Sorted prompts, the tree of their shared prefixes, and the best groups.

Sorted, the prompts of a prefix stand side by side, and what two neighbours have in common is all that a longer search
could find: the sum of common prefixes of neighbours is the most that any sharing can save. The tree keeps prefixes that
at least two prompts have, cut down to whole pages. Groups in it are chosen by a dynamic programme that is exact, where
BatchLLM (arXiv 2412.03594) collapses the tree step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_SHORTEST, _LONGEST, _AT_ONCE = 64, 1024, 2**18
"""Tokens of two prompts compared at a time, first and at most, and tokens of all pairs: what stays in a cache."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts in one piece of memory.

    Attributes:
        data: big-endian int32 [sum of lengths], which sort as bytes, and `_LONGEST` zeros after them.
        starts: int64 [N]: which token each begins with.
        lengths: int64 [N].
    """

    data: bytes
    starts: Integers
    lengths: Integers

    @staticmethod
    def of(prompts: Sequence[Sequence[int] | NDArray[np.integer]]) -> Prompts:
        """Return prompts given one by one, as arrays or as lists."""
        lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
        parts: Sequence[Sequence[int] | NDArray[np.integer]] = prompts
        if not all(isinstance(prompt, np.ndarray) for prompt in prompts):
            parts = [np.fromiter(chain.from_iterable(prompts), np.int32, int(lengths.sum()))]
        tokens = np.concatenate([*parts, np.zeros(_LONGEST, np.int32)], dtype=">i4", casting="unsafe")
        return Prompts(tokens.tobytes(), np.cumsum(lengths) - lengths, lengths)

    def sorted(self) -> Integers:
        """Return the order in which prompts of a common prefix stand side by side, a prefix before what it begins."""
        bounds = zip((4 * self.starts).tolist(), (4 * (self.starts + self.lengths)).tolist(), strict=True)
        keys = [self.data[start:stop] for start, stop in bounds]
        return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)

    def common(self, order: Integers) -> Integers:
        """Return how many tokens each prompt of an order has in common with the one before it; int64 [N], 0 first."""
        before, after = order[:-1], order[1:]
        result = np.minimum(self.lengths[before], self.lengths[after])
        most, at, block = result.copy(), 0, _SHORTEST
        tokens = np.frombuffer(self.data, np.int32)  # in whatever order of bytes: equal is equal
        starts, others = self.starts[before], self.starts[after]
        active = np.flatnonzero(most)
        while active.size:
            windows = np.lib.stride_tricks.sliding_window_view(tokens, block)
            alike, rows_at_once = [], _AT_ONCE // block
            for rows in np.split(active, range(rows_at_once, active.size, rows_at_once)):
                differ = windows[starts[rows] + at] != windows[others[rows] + at]
                place = differ.argmax(axis=1)
                found = differ[np.arange(rows.size), place]
                ended = rows[found]
                result[ended] = np.minimum(at + place[found], most[ended])
                alike.append(rows[~found])
            at += block
            active = np.concatenate(alike)
            active = active[most[active] > at]
            block = min(2 * block, _LONGEST)
        return np.concatenate([np.zeros(min(1, order.size), np.int64), result])


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Prefixes that at least two prompts share, the longer below the shorter.

    Attributes:
        parents: int64 [V]: node 0 is the root, its parent -1; a parent stands before its children.
        depths: int64 [V]: tokens of a node's prefix, 0 of the root; the prefix of its parent is part of it.
        firsts: int64 [V]: the first prompt of each, in sorted order.
        nodes: int64 [N]: the deepest node of each prompt, in sorted order.
    """

    parents: Integers
    depths: Integers
    firsts: Integers
    nodes: Integers

    @staticmethod
    def of(common: Integers) -> PrefixTree:
        """Return the tree of sorted prompts.

        Args:
            common: int64 [N]: tokens that each may share with the one before it; the first is not read.
        """
        parents, depths, firsts, nodes, path = [-1], [0], [0], [0] * len(common), [0]
        for place, shared in enumerate(common[1:].tolist(), 1):
            above = 0
            while depths[path[-1]] > shared:
                above = path.pop()
            if depths[path[-1]] < shared:
                node = len(parents)
                parents.append(path[-1])
                depths.append(shared)
                if above:
                    parents[above] = node
                    firsts.append(firsts[above])
                else:
                    nodes[place - 1] = node
                    firsts.append(place - 1)
                path.append(node)
            nodes[place] = path[-1]
        sequence = np.lexsort((depths, firsts))  # a node before what is below it
        names = np.empty_like(sequence)
        names[sequence] = np.arange(sequence.size)
        renamed = names[np.array(parents)][sequence]
        renamed[0] = -1
        return PrefixTree(
            renamed,
            np.array(depths, dtype=np.int64)[sequence],
            np.array(firsts, dtype=np.int64)[sequence],
            names[np.array(nodes, dtype=np.int64)],
        )

    @property
    def ends(self) -> Integers:
        """Prompts whose deepest node this is; int64 [V]."""
        return np.bincount(self.nodes, minlength=self.parents.size)

    def sums(self, values: Integers) -> Integers:
        """Return the sum of values of nodes over each node and all below it; int64 [V]."""
        total = values.tolist()
        for node, parent in zip(range(len(total) - 1, 0, -1), self.parents[:0:-1].tolist(), strict=True):
            total[parent] += total[node]
        return np.array(total, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which prefixes are groups.

    Attributes:
        nodes: int64 [V]: the node whose group the prompts of a node are in, itself or one above it; 0 is no group.
        saved: tokens that grouping saves, less the costs of groups.
    """

    nodes: Integers
    saved: int


def best_groups(tree: PrefixTree, *, cost: int = 0, nested: bool = False) -> Grouping:
    """Return the grouping that saves most; of equal ones that with the fewer groups.

    A prompt in a group of prefix d saves d tokens. A group costs its own prefix once: all of it where groups stand
    beside each other (one level: attention over a shared prefix), what the group around it has not where they are
    nested (pages of a cache). It is a dynamic programme over (node, depth of the group that is open there),
    O(nodes x height).

    Args:
        tree: the prefixes that there are.
        cost: tokens that one more group has to save beside those of its prefix, at least 0.
        nested: whether a group may stand in another and have its prefix from there.
    """
    parents, depths, ends = tree.parents.tolist(), tree.depths.tolist(), tree.ends.tolist()
    count = len(parents)
    levels, paths = [0] * count, [[0]] * count  # paths: depths of the nodes from the root to this one
    for node in range(1, count):
        levels[node] = levels[parents[node]] + 1
        paths[node] = [*paths[parents[node]], depths[node]]
    below = [[0] * (level + 1) for level in levels]  # of the children, for each node that may be open
    opens: list[list[bool]] = [[] for _ in parents]
    for node in range(count - 1, 0, -1):
        path, sums, end, depth = paths[node], below[node], ends[node], depths[node]
        alone = end * depth + sums[-1] - depth - cost
        into = below[parents[node]]
        for level in range(levels[node]):
            stay = end * path[level] + sums[level]
            own = alone + path[level] if nested else alone
            opens[node].append(own > stay)
            into[level] += max(own, stay)
    chosen = [0] * count
    for node in range(1, count):
        around = chosen[parents[node]]
        chosen[node] = node if opens[node][levels[around]] else around
    return Grouping(np.array(chosen, dtype=np.int64), below[0][0])


def runs_of_equal(common: Integers, lengths: Integers) -> Integers:
    """Return a number for each sorted prompt that equal prompts have in common; int64 [N].

    Args:
        common: int64 [N]: tokens that each has in common with the one before it.
        lengths: int64 [N]: tokens of each, in sorted order.
    """
    fresh = np.ones(common.size, dtype=bool)
    fresh[1:] = (common[1:] != lengths[1:]) | (lengths[1:] != lengths[:-1])
    return np.cumsum(fresh) - 1
