"""In which order do many known prompts run, and who shares what? BatchLLM's plan (arXiv 2412.03594), over all levels.

Every prefix that prompts share is computed once: requests run depth first through the tree of prefixes, so that those
of a prefix follow each other, and its pages are free when the last of them ends. The future is known, and nothing is
kept for longer or evicted by guess. Beside each other, what decodes most for the prompt tokens that it computes comes
first: later prompts then fill the steps that would otherwise only decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tersor.engine.prefix_tree import Integers, PrefixTree, Prompts, best_groups, runs_of_equal
from tersor.errors import InputError

PAGE = 64
"""Tokens of a page of keys and values."""

GROUP_COST = 768
"""Tokens of keys and values that a group of attention has to save: 4 members of a prefix of 256 are where it begins."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of requests and what they share. M requests run for N prompts; positions are places in the order.

    Attributes:
        page: tokens of a page; prefixes are shared in whole pages.
        order: int64 [M]: the prompt of each position.
        runs_as: int64 [N]: the prompt whose answer a prompt takes: itself, or an equal one before it.
        lengths, outputs: int64 [M]: tokens of the prompt of each position, and those expected to be drawn.
        reused: int64 [M]: tokens of the prompt that the position before it shares; the first of a prefix computes it.
        parents, depths: int64 [V]: the tree of prefixes; node 0 is the root, parents stand before their children, a
            depth is the tokens of a whole prefix.
        firsts, stops: int64 [V]: the positions of a node are those from firsts to stops.
        nodes: int64 [M]: the deepest node of each position, whose prefix it shares.
        groups: int64 [M]: the node over whose prefix a position computes attention together with others; 0 is none.
        total: tokens of all N prompts.
        optimum: the most of them that any sharing could save: what neighbours in sorted order have in common.
        saved: what the plan saves of them, prompts that do not run included.
    """

    page: int
    order: Integers
    runs_as: Integers
    lengths: Integers
    outputs: Integers
    reused: Integers
    parents: Integers
    depths: Integers
    firsts: Integers
    stops: Integers
    nodes: Integers
    groups: Integers
    total: int
    optimum: int
    saved: int

    @property
    def reuse(self) -> float:
        """The part of all prompt tokens that is not computed."""
        return self.saved / max(1, self.total)

    def path(self, position: int) -> list[int]:
        """Return the nodes whose prefixes a position shares, from the shortest prefix to the longest."""
        nodes, node = [], int(self.nodes[position])
        while node:
            nodes.append(node)
            node = int(self.parents[node])
        return nodes[::-1]


class Pins:
    """Which prefixes are still needed, where requests end in any order? Each goes with the last of its positions."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._left = (plan.stops - plan.firsts).tolist()

    def needed(self, node: int) -> bool:
        """Whether a position of this node has not ended."""
        return bool(self._left[node])

    def end(self, position: int) -> list[int]:
        """Note that a position ended, each once, and return the nodes whose pages are free now, the deepest first."""
        freed = []
        for node in reversed(self._plan.path(position)):
            self._left[node] -= 1
            if not self._left[node]:
                freed.append(node)
        return freed


def plan(
    prompts: Sequence[Sequence[int] | NDArray[np.integer]],
    outputs: ArrayLike = 1,
    *,
    page: int = PAGE,
    group_cost: int = GROUP_COST,
    alike: ArrayLike | None = None,
) -> Plan:
    """Plan the run of prompts.

    A prompt shares at most all but its last token, which is computed for the first token to be drawn.

    Args:
        prompts: tokens of each, below 2^31.
        outputs: tokens expected to be drawn for each, or one number for all.
        page: tokens of a page.
        group_cost: tokens that a group of attention has to save beside those of its prefix (`best_groups`).
        alike: a number a prompt: equal prompts of one number have one answer (greedy, all options equal) and run once;
            numbers below 0 are of prompts that run for themselves. `None` has all run.

    Raises:
        InputError: a number is out of its range, or there are not as many as prompts.
    """
    if page < 1 or group_cost < 0:
        raise InputError(f"page is {page} and group_cost {group_cost}: they must be at least 1 and 0")
    count = len(prompts)
    expected = _each("outputs", outputs, count)
    if count and expected.min() < 0:
        raise InputError(f"outputs holds {expected.min()}: tokens expected are at least 0")
    packed = Prompts.of(prompts)
    order = packed.sorted()
    common = packed.common(order)
    total, optimum = int(packed.lengths.sum()), int(common.sum())
    runs_as, kept = np.arange(count), np.ones(count, dtype=bool)
    if alike is not None:
        runs_as[order], kept = _run_once(order, common, packed.lengths[order], _each("alike", alike, count))
        common = _least_between(common, kept)
        order = order[kept]
    lengths = packed.lengths[order]
    most = np.minimum(lengths, np.concatenate([lengths[:1], lengths[:-1]])) - 1
    shared = np.maximum(np.minimum(common, most), 0) // page * page
    tree = PrefixTree.of(shared)
    outputs_sorted = expected[order]
    firsts, stops, places = _depth_first(tree, lengths, outputs_sorted)
    nodes = tree.nodes[places]
    reused = _reused(tree, firsts, nodes)
    grouping = best_groups(tree, cost=group_cost)
    return Plan(
        page=page,
        order=order[places],
        runs_as=runs_as,
        lengths=lengths[places],
        outputs=outputs_sorted[places],
        reused=reused,
        parents=tree.parents,
        depths=tree.depths,
        firsts=firsts,
        stops=stops,
        nodes=nodes,
        groups=grouping.nodes[nodes],
        total=total,
        optimum=optimum,
        saved=total - int(lengths.sum()) + int(reused.sum()),
    )


def _each(name: str, values: ArrayLike, count: int) -> Integers:
    array = np.asarray(values, dtype=np.int64)
    if array.ndim and array.shape != (count,):
        raise InputError(f"{name} has shape {list(array.shape)}, expected [{count}]: one for each prompt")
    return np.broadcast_to(array, (count,)).copy()


def _run_once(
    order: Integers, common: Integers, lengths: Integers, alike: Integers
) -> tuple[Integers, NDArray[np.bool_]]:
    """Return which prompt each of the sorted order runs as, the first of the input, and whether that is itself."""
    runs, kinds = runs_of_equal(common, lengths), alike[order]
    kinds = np.where(kinds < 0, -1 - np.arange(order.size), kinds)  # alone
    together = np.lexsort((order, kinds, runs))
    fresh = np.ones(order.size, dtype=bool)
    fresh[1:] = (runs[together][1:] != runs[together][:-1]) | (kinds[together][1:] != kinds[together][:-1])
    result = np.empty_like(order)
    result[together] = order[together][np.flatnonzero(fresh)][np.cumsum(fresh) - 1]
    return result, result == order


def _least_between(common: Integers, kept: NDArray[np.bool_]) -> Integers:
    """Return what those kept have in common with the one kept before them."""
    places = np.flatnonzero(kept)
    if not places.size:
        return common[:0]
    starts = np.concatenate([[0], places[:-1] + 1])
    return np.minimum.reduceat(common[: places[-1] + 1], starts)


def _depth_first(tree: PrefixTree, lengths: Integers, outputs: Integers) -> tuple[Integers, Integers, Integers]:
    """Return the first position and the one after the last of every node, and the sorted place of each position.

    Below a node its children and its own prompts stand by decode / prefill, the largest first, equal ones as sorted.
    """
    count, prompts = tree.parents.size, lengths.size
    depths, nodes = tree.depths, tree.nodes
    own = lengths - depths[nodes]
    edges = depths - depths[np.maximum(tree.parents, 0)]
    prefill = tree.sums(edges + np.bincount(nodes, own, count).astype(np.int64))
    decode = tree.sums(np.bincount(nodes, outputs, count).astype(np.int64))
    sizes = tree.sums(tree.ends)
    # Items are the nodes but the root, then the prompts: each stands below one node.
    below = np.concatenate([tree.parents[1:], nodes])
    ratio = np.concatenate([decode[1:], outputs]) / np.maximum(1, np.concatenate([prefill[1:], own]))
    width = np.concatenate([sizes[1:], np.ones(prompts, dtype=np.int64)])
    items = np.lexsort((np.concatenate([tree.firsts[1:], np.arange(prompts)]), -ratio, below))
    before = np.cumsum(width[items]) - width[items]
    begins = np.searchsorted(below[items], np.arange(count))  # of each node, its first item
    offsets = np.empty_like(before)
    offsets[items] = before - before[begins[below[items]]]
    firsts, steps = [0] * count, offsets.tolist()
    for node, parent in enumerate(tree.parents[1:].tolist(), 1):
        firsts[node] = firsts[parent] + steps[node - 1]
    starts = np.array(firsts, dtype=np.int64)
    places = np.empty(prompts, dtype=np.int64)
    places[starts[nodes] + offsets[count - 1 :]] = np.arange(prompts)
    return starts, starts + sizes, places


def _reused(tree: PrefixTree, firsts: Integers, nodes: Integers) -> Integers:
    """Return what each position shares with the one before it: all of its prefix that did not begin with it."""
    reused = tree.depths[nodes]
    # Children stand after their parents: the shortest prefix that begins at a position is written last.
    fresh = np.arange(firsts.size - 1, 0, -1)
    reused[firsts[fresh]] = tree.depths[tree.parents[fresh]]
    return reused
