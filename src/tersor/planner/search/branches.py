"""The optimum within limits, from the best prices: what they leave open is looked through, nearest plans first.

Tables of an elimination say of every beginning of a plan how little any end of it can add: in seconds and prices, and
in bytes of each limit. Beginnings that cannot lead to a better plan, or to one that fits, are left. Where all of them
were looked at the best plan is the optimum; else the least of what is left is the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tersor.errors import InputError
from tersor.planner.problem import Floats
from tersor.planner.search.elimination import Elimination, Tables
from tersor.planner.search.fold import Graph, Options
from tersor.planner.search.prices import EQUAL, Priced
from tersor.planner.search.unfit import UnfitError


@dataclass(frozen=True, slots=True)
class Looked:
    """What looking through beginnings gave.

    Attributes:
        plan: options of nodes of the best plan known that fits.
        bound: no plan that fits takes less.
        branches: beginnings that were looked at.
    """

    plan: Options
    bound: float
    branches: int


def look_through(
    graph: Graph, elimination: Elimination, priced: Priced, leasts: list[Tables], known: Options | None, most: int
) -> Looked:
    """Return the best plan that fits.

    Args:
        graph: with limits.
        elimination: its order.
        priced: the best prices.
        leasts: tables of the least bytes of each limit.
        known: a plan that fits, if there is one.
        most: beginnings to look at.

    Raises:
        UnfitError: no plan fits.
        InputError: none was found that does.
    """
    best = known
    seconds = float(graph.evaluate(known[None])[0][0]) if known is not None else float("inf")
    order = list(reversed(elimination.order))
    beside = list(reversed(elimination.beside))
    tables = list(reversed(priced.tables.each))
    byte_tables = [np.stack(each, axis=-1) for each in zip(*(reversed(each.each) for each in leasts), strict=True)]
    room = graph.room
    most_taken = room + EQUAL * np.abs(room)
    options = np.zeros(len(order), dtype=np.int64)
    waiting: list[tuple[int, int, float, Floats]] = []
    branches = 0

    def open_node(place: int, bound: float, taken: Floats) -> None:
        """Put the options of the next node on the stack, the nearest on top."""
        where = tuple(options[other] for other in beside[place])
        row, lines = tables[place][where], byte_tables[place][where]
        costs = bound + (row - row.min())
        own = taken + (lines - lines.min(axis=0))
        fits = np.isfinite(costs) & (own <= most_taken).all(axis=1)
        farthest = np.argsort(-costs, kind="stable")
        for option in farthest[fits[farthest]].tolist():
            waiting.append((place, option, float(costs[option]), own[option]))

    open_node(0, priced.bound, np.array([each.least for each in leasts]))
    while waiting and branches < most:
        place, option, bound, taken = waiting.pop()
        if bound >= seconds - EQUAL * abs(seconds):
            continue
        branches += 1
        options[order[place]] = option
        if place + 1 < len(order):
            open_node(place + 1, bound, taken)
        elif bound + float(priced.prices @ (room - taken)) < seconds:  # prices are paid for what is not taken, too
            own, nbytes = graph.evaluate(options[None])
            if float(own[0]) < seconds and (nbytes[0] <= room).all():
                best, seconds = options.copy(), float(own[0])
    left = min((bound for _, _, bound, _ in waiting), default=seconds)
    if best is None:
        if not waiting:
            raise UnfitError
        raise InputError(
            f"of {branches:,} beginnings of plans none keeps all of these limits at once: "
            f"{', '.join(name for name, _ in graph.limits)}; the full search may tell whether one does"
        )
    return Looked(best, max(priced.bound, min(seconds, left)), branches)


def repaired(graph: Graph, plans: list[Options]) -> Options | None:
    """Return the best plan that fits of these, of what lies between two of them, and of small changes to it."""
    rows = np.unique(np.array(plans), axis=0)
    seconds, nbytes = graph.evaluate(rows)
    fits = (nbytes <= graph.room).all(axis=1)
    if not fits.any():
        return None
    best = rows[np.where(fits, seconds, np.inf).argmin()]
    least = float(seconds[fits].min())
    for other in rows[np.argsort(seconds, kind="stable")][:6]:  # each is faster, and takes too much
        cut = np.tri(len(best) + 1, len(best), -1, dtype=bool)
        mixed = np.concatenate((np.where(cut, best, other), np.where(cut, other, best)))
        own, taken = graph.evaluate(mixed)
        own = np.where((taken <= graph.room).all(axis=1), own, np.inf)
        if own.min() < least:
            best, least = mixed[own.argmin()], float(own.min())
    return _improved(graph, best)


def _improved(graph: Graph, plan: Options) -> Options:
    """Change one node, or two with an edge between them, as long as that is faster and fits."""
    options = plan.copy()
    near: list[list[tuple[int, Floats]]] = [[] for _ in graph.seconds]
    for (one, other), matrix in graph.edges.items():
        near[one].append((other, matrix))
        near[other].append((one, matrix.T))
    slack = graph.room - graph.evaluate(options[None])[1][0]

    def alone(node: int, without: int = -1) -> Floats:
        """Seconds of every option of a node beside what the others have."""
        costs = graph.seconds[node].copy()
        for other, matrix in near[node]:
            if other != without:
                costs += matrix[:, options[other]]
        return costs

    better = True
    while better:
        better = False
        for node in range(len(options)):
            costs, now = alone(node), options[node]
            more = graph.bytes[node] - graph.bytes[node][now]
            costs = np.where((more <= slack).all(axis=1), costs, np.inf)
            if costs.min() < costs[now] - EQUAL * abs(costs[now]):
                options[node] = costs.argmin()
                slack -= more[options[node]]
                better = True
        for (one, other), matrix in graph.edges.items():
            pair = alone(one, other)[:, None] + alone(other, one) + matrix
            now = pair[options[one], options[other]]
            first = graph.bytes[one] - graph.bytes[one][options[one]]
            more = first[:, None] + graph.bytes[other] - graph.bytes[other][options[other]]
            pair = np.where((more <= slack).all(axis=2), pair, np.inf)
            if pair.min() < now - EQUAL * abs(now):
                options[one], options[other] = np.unravel_index(pair.argmin(), pair.shape)
                slack -= more[options[one], options[other]]
                better = True
    return options
