"""Which pages do decoding rows read together? Found in the tables of their pages, chosen by what it costs.

Rows of one step whose tables begin with the same pages share a prefix, whoever found it: the cache of prefixes or the
plan of a batch. Sorted by their tables, rows that share something stand side by side, and what neighbours have in
common makes a tree: at a node, some rows with some pages that all of them have next. From the root down, a node is read
together where that costs less than every row for itself, and less than each of its children for itself. `ops.Rows` says
how attention is told (`shared`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tersor.kernels.attention import most_parts
from tersor.kernels.tune.shared_pages import SharedCosts

if TYPE_CHECKING:
    from numpy.typing import NDArray

AHEAD = 3
"""Pages that the start and the end of an item take as long as."""


def most_items(rows: int) -> int:
    """Return how many items a step of so many rows has room for."""
    return rows + 32


def shared_size(rows: int) -> int:
    """Return the numbers of `ops.Rows.shared` in a step of so many rows."""
    return 1 + 3 * rows + 5 * most_items(rows)


@dataclass(slots=True)
class SharedPages:
    """What some rows read together.

    Attributes:
        order: int32 [R], rows so that those of an item stand side by side.
        own: int32 [R, 2]: of every row the first page that it reads for itself, and its parts that others read.
        items: (first row of the order, rows, first page, end, part) of each.
        pages: that are read together, each counted once.
        again: how often rows would read them in vain.
        tiles: how often they are read, for as many rows as a CTA takes at a time.
        parts: of all rows, that others read.
    """

    order: NDArray[np.int32]
    own: NDArray[np.int32]
    items: list[tuple[int, int, int, int, int]]
    pages: int = 0
    again: int = 0
    tiles: int = 0
    parts: int = 0

    def turns(self, costs: SharedCosts) -> int:
        """Return pages that a CTA reads one after the other, and what the start and the end of its items take."""
        longest = max(end - begin for _, _, begin, end, _ in self.items)
        return -(-len(self.items) * costs.kv_heads // costs.ctas) * (longest + AHEAD)

    def saved(self, costs: SharedCosts) -> float:
        """Return the seconds of one layer that this is predicted to save."""
        apart = self.pages * costs.page + self.again * costs.again
        together = max(self.tiles * costs.tile, self.turns(costs) * costs.turn)
        return apart - together - self.parts * costs.part - costs.launch

    def write(self, numbers: NDArray[np.int32], rows: int) -> None:
        """Write them as `ops.Rows.shared` of a step padded to `rows` rows; int32 [shared_size(rows)]."""
        write_nothing(numbers, rows)
        count, items = len(self.order), 1 + 3 * rows
        numbers[0] = len(self.items)
        numbers[1 : 1 + count] = self.order
        numbers[1 + rows : 1 + rows + 2 * count] = self.own.ravel()
        numbers[items : items + 5 * len(self.items)] = np.array(self.items, np.int32).ravel()


def write_nothing(numbers: NDArray[np.int32], rows: int) -> None:
    """Write that no rows share anything, as `SharedPages.write`."""
    numbers[: 1 + 3 * rows] = 0


@dataclass(slots=True, eq=False)
class _Node:
    """Rows `first` to `end` of the order, whose first `depth` pages are the same."""

    depth: int
    first: int
    end: int = 0
    children: list[_Node] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Reading:
    """A node whose pages from `begin` on are read together, and the one above it that is, too."""

    node: _Node
    begin: int
    above: _Reading | None
    below: int = 0
    parts: int = 0
    used: int = 0


def shared_pages(
    tables: NDArray[np.int32], full: NDArray[np.int32], rows: int, costs: SharedCosts
) -> SharedPages | None:
    """Choose what rows read together, or `None` where nothing is predicted to save time.

    Args:
        tables, full, rows, costs: of `best`.
    """
    found = best(tables, full, rows, costs)
    return None if found is None or found.saved(costs) <= 0 else found


def best(
    tables: NDArray[np.int32],
    full: NDArray[np.int32],
    rows: int,
    costs: SharedCosts,
    nodes: SharedCosts | None = None,
) -> SharedPages | None:
    """Choose what rows read together, whether that saves as much as the kernel for it costs or not; `None` is nothing.

    Args:
        tables: int32 [R, M], pages of every row.
        full: int32 [R], leading pages of every row that the step does not write.
        rows: of the step, R or more; what there is room for depends on it.
        costs: of a layer.
        nodes: by which nodes are chosen, instead; items are as long as `costs` say.
    """
    if len(tables) < 2 or costs.rows < 2 or len(set(tables[full > 0, 0].tolist())) == int((full > 0).sum()):
        return None
    order, common = _sorted(tables, full)
    readings = _readings(_tree(common), nodes or costs)
    if not readings:
        return None
    length = _item_pages(readings, costs, most_parts(rows))
    return _planned(order, readings, length, rows, costs)


def _sorted(tables: NDArray[np.int32], full: NDArray[np.int32]) -> tuple[NDArray[np.int32], list[int]]:
    """Return rows in an order, and how many leading pages each has in common with the next; the last has none."""
    most = int(full.max())
    places = np.arange(most, dtype=np.int32)
    known = np.where(places < full[:, None], tables[:, :most], -1).astype(np.int32)
    order = np.argsort(known.view(np.dtype((np.void, 4 * most))).ravel(), kind="stable").astype(np.int32)
    known, full = known[order], full[order]
    differ = np.ones((len(order), most + 1), np.bool_)
    differ[:-1, :most] = known[1:] != known[:-1]
    common = np.minimum(differ.argmax(axis=1), full)
    common[:-1] = np.minimum(common[:-1], full[1:])
    common[-1] = 0
    return order, common.tolist()


def _tree(common: list[int]) -> list[_Node]:
    """Return the nodes that no other contains (intervals of common prefixes: Abouelhoda et al. 2004)."""
    stack = [_Node(0, 0)]
    for row, depth in enumerate(common):
        first, child = row, None
        while depth < stack[-1].depth:
            node = stack.pop()
            node.end, first, child = row + 1, node.first, node
            if depth <= stack[-1].depth:
                stack[-1].children.append(node)
                child = None
        if depth > stack[-1].depth:
            stack.append(_Node(depth, first, children=[] if child is None else [child]))
    return stack[0].children


def _tiles(node: _Node, costs: SharedCosts) -> int:
    return -(-(node.end - node.first) // costs.rows)


def _readings(roots: list[_Node], costs: SharedCosts) -> list[_Reading]:
    """Choose nodes; those above come before those below."""
    found: list[_Reading] = []
    waiting: list[tuple[_Node, int, _Reading | None]] = [(node, 0, None) for node in roots]
    while waiting:
        node, begin, above = waiting.pop()
        count, pages = node.end - node.first, node.depth - begin
        together = pages * _tiles(node, costs) * costs.tile + count * costs.part
        apart = pages * (costs.page + (count - 1) * costs.again)
        if node.children:  # each of which may read these pages, too
            saved = 0.0
            for child in node.children:
                some = child.end - child.first
                saved += max(some * costs.again - _tiles(child, costs) * costs.tile, 0.0)
            apart -= pages * saved
        if together < apart:
            above = _Reading(node, begin, above)
            begin = node.depth
            found.append(above)
        waiting += [(child, begin, above) for child in node.children]
    for one in reversed(found):
        if one.above is not None:
            one.above.below = max(one.above.below, one.below + 1)
    return found


def _item_pages(readings: list[_Reading], costs: SharedCosts, most: int) -> int:
    """Return the pages of an item with which all that is read together is predicted to take least time."""
    pages = np.array([one.node.depth - one.begin for one in readings])
    tiles = np.array([_tiles(one.node, costs) for one in readings])
    rows = np.array([one.node.end - one.node.first for one in readings])
    lengths = -(-pages.max() // np.arange(1, most + 1))
    parts = -(-pages // lengths[:, None])
    turns = -(-(parts @ tiles) * costs.kv_heads // costs.ctas) * (lengths + AHEAD)
    reading = np.maximum(turns * costs.turn, pages @ tiles * costs.tile)
    return int(lengths[np.argmin(reading + parts @ rows * costs.part)])


def _planned(
    order: NDArray[np.int32], readings: list[_Reading], length: int, rows: int, costs: SharedCosts
) -> SharedPages | None:
    """Cut what is read together into items of up to `length` pages, as many as there is room for."""
    most, room = most_parts(rows), most_items(rows)
    own = np.zeros((len(order), 2), np.int32)
    found = SharedPages(order, own, [])
    items = found.items
    for one in readings:
        node, above = one.node, one.above
        if above is not None:
            if not above.parts:
                continue
            one.used = above.used + above.parts
        count, pages, tiles = node.end - node.first, node.depth - one.begin, _tiles(node, costs)
        parts = min(-(-pages // length), most - one.used - one.below, (room - len(items)) // tiles)
        if parts < 1:
            continue
        one.parts = parts
        edges = [one.begin + pages * part // parts for part in range(parts + 1)]
        firsts = [node.first + count * tile // tiles for tile in range(tiles + 1)]
        for tile in range(tiles):
            first, some = firsts[tile], firsts[tile + 1] - firsts[tile]
            items += [(first, some, edges[part], edges[part + 1], one.used + part) for part in range(parts)]
        own[order[node.first : node.end]] = (node.depth, one.used + parts)
        found.pages += pages
        found.again += pages * (count - 1)
        found.tiles += pages * tiles
        found.parts += count * parts
    return found if items else None
