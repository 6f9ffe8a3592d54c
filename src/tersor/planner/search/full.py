"""The optimum of any problem, with a certificate: an integer programme for HiGHS, through scipy (the extra `plan`).

Every option of a node is a variable of 0 or 1. An edge has one for every pair of options, between 0 and 1, whose rows
add up to the options of one end and whose columns to those of the other: so tight that the programme without whole
numbers is nearly whole already, and its least is the bound that is printed (the formulation of Alpa's auto-sharding,
arXiv 2201.12023, with edges as flows). Each limit of memory is a row. A choice that is known ahead, by default that of
`fast`, is what a better one may not exceed: options whose reduced costs say so are taken out before branching. The
bound is that of HiGHS alone.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tersor.errors import InputError, UnsupportedError
from tersor.planner.problem import Choice, Floats, Problem
from tersor.planner.search.elimination import Elimination
from tersor.planner.search.fast import fast
from tersor.planner.search.fold import Graph, Options, fold
from tersor.planner.search.found import Found
from tersor.planner.search.presolve import presolve
from tersor.planner.search.unfit import UnfitError, reason

SCALE = 1e5
"""What the sum of the programme without whole numbers becomes: HiGHS stops at absolute differences of 1e-6."""

TIGHTER = 1e-6
"""Of a limit, what HiGHS may exceed it by; where it does, the limit is lowered by twice that and solved again."""

SLACK = 1e-7
"""Of the bound, what reduced costs are trusted to."""


def full(
    problem: Problem, *, seconds: float = 60.0, gap: float = 1e-4, start: Choice | None = None, alone: bool = False
) -> Found:
    """Return the best choice, within a gap.

    Args:
        problem: ties are kept; `fold.untied` takes them off, so that every layer may choose for itself.
        seconds: after so many the best choice so far is returned, with the bound so far.
        gap: by what part of its time the choice may be improved at most; 0 asks for the optimum.
        start: a choice that fits; where there is none `fast` is asked first.
        alone: whether HiGHS starts from nothing instead.

    Raises:
        InputError: no choice fits: the line names the limit and what is missing; or the time was too short.
        UnsupportedError: scipy is not installed.
    """
    check_scipy()
    begin = time.perf_counter()
    try:
        graph = presolve(fold(problem))
        known = None
        if start is not None:
            known = _started(problem, start)
        elif not alone and not Elimination(graph.sizes, graph.edges).too_wide:
            known = fast(problem)
        return _Programme(problem, graph).solve(begin, seconds, gap, known)
    except UnfitError:
        raise reason(problem) from None


def check_scipy() -> None:
    """Say before a long search that it could not be made.

    Raises:
        UnsupportedError: scipy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise UnsupportedError("the full search needs scipy: pip install 'tersor[plan]'")


def _started(problem: Problem, start: Choice) -> Found:
    """Return a choice of which nothing is known but that it fits."""
    if not problem.fits(start):
        raise InputError("the choice to start from does not fit: it exceeds a limit or breaks a tie")
    return Found(start, problem.seconds(start), float("-inf"), 0.0, "the choice to start from")


def _too_short(seconds: float) -> InputError:
    return InputError(f"no choice was found in {seconds:g} s: give the search more, or a choice to start from")


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a sparse matrix, each with a least and a most."""

    rows: Any
    columns: Any
    values: Floats
    least: Floats
    most: Floats


class _Programme:
    """The integer programme of a graph."""

    def __init__(self, problem: Problem, graph: Graph) -> None:
        self._problem, self._graph = problem, graph
        sizes = graph.sizes
        self._first = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        self._binary = int(self._first[-1])
        edges = [matrix.ravel() for matrix in graph.edges.values()]
        costs = np.concatenate((*graph.seconds, *edges)) if sizes else np.zeros(0)
        self._open = np.isfinite(costs)
        self._costs = np.where(self._open, costs, 0.0)
        self._flows = self._flow_rows()

    def solve(self, begin: float, seconds: float, gap: float, known: Found | None) -> Found:
        """Return the best choice; see `full`."""
        best, least = (None, float("inf")) if known is None else (known.choice, known.seconds)
        method, steps = "HiGHS, without whole numbers", 0
        left = seconds - (time.perf_counter() - begin)
        relaxed = self._linear(left) if left > 0 else None
        if relaxed is None:
            if known is None:
                raise _too_short(seconds)
            method = f"{known.method}; HiGHS did not finish in {seconds:g} s"
            return replace(known, searched=time.perf_counter() - begin, method=method)
        bound = float(relaxed.fun)
        whole = self._rounded(relaxed.x)
        if whole is not None and self._problem.seconds(whole) < least:
            best, least = whole, self._problem.seconds(whole)
        if best is None or least - bound > gap * abs(least):
            method = "HiGHS, integer programme"
            upper = self._open.astype(np.float64)
            if best is not None:
                reduced = np.asarray(relaxed.lower.marginals)
                upper[(reduced > least - bound + SLACK * abs(bound)) & (upper > 0)] = 0.0
            self._scale = SCALE / max(abs(bound), 1e-300)
            for tightening in (0.0, 2 * TIGHTER):
                left = seconds - (time.perf_counter() - begin)
                if left <= 0:
                    break
                done = self._integer(upper, gap, left, tightening)
                steps += int(done.mip_node_count or 0)
                if not tightening and done.mip_dual_bound is not None:
                    # Options that were taken out lead to nothing better than what was known.
                    bound = max(bound, min(float(done.mip_dual_bound) / self._scale, least))
                if done.status == 2:
                    if best is None:
                        raise UnfitError
                    bound = bound if tightening else least
                    break
                whole = None if done.x is None else self._rounded(done.x)
                if whole is not None and self._problem.seconds(whole) < least:
                    best, least = whole, self._problem.seconds(whole)
                if whole is not None or done.x is None:
                    break
        if best is None:
            raise _too_short(seconds)
        bound = least if bound >= least * (1 - 1e-12) else bound
        return Found(best, least, bound, time.perf_counter() - begin, method, steps)

    def _flow_rows(self) -> _Rows:
        """One option for each node, and pairs of an edge that add up to the options of its ends."""
        graph, first = self._graph, self._first
        counts = np.array(graph.sizes, dtype=np.int64)
        nodes = len(counts)
        rows, columns = [np.repeat(np.arange(nodes), counts)], [np.arange(self._binary)]
        values = [np.ones(self._binary)]
        row, pair = nodes, self._binary
        for (one, other), matrix in graph.edges.items():
            height, width = matrix.shape
            pairs = pair + np.arange(height * width).reshape(height, width)
            for node, table in ((one, pairs), (other, pairs.T)):
                size = len(table)
                rows += [np.repeat(row + np.arange(size), table.shape[1]), row + np.arange(size)]
                columns += [table.ravel(), first[node] + np.arange(size)]
                values += [np.ones(table.size), -np.ones(size)]
                row += size
            pair += height * width
        equal = np.concatenate((np.ones(nodes), np.zeros(row - nodes)))
        return _Rows(np.concatenate(rows), np.concatenate(columns), np.concatenate(values), equal, equal)

    def _limits(self, tightening: float) -> tuple[Floats, Floats]:
        """Return [limits, variables] of options, and the most of each, both in parts of the limit."""
        taken = np.concatenate(self._graph.bytes).T
        scale = np.maximum(np.abs(self._graph.room), 1.0)
        return taken / scale[:, None], self._graph.room / scale - tightening

    def _linear(self, seconds: float) -> Any:
        """Solve without whole numbers; costs are given back as they were; None where the time is too short."""
        from scipy.optimize import linprog
        from scipy.sparse import csr_matrix, hstack

        flows, count = self._flows, len(self._costs)
        equal = csr_matrix((flows.values, (flows.rows, flows.columns)), (len(flows.least), count))
        limits, most = self._limits(0.0)
        rows = hstack([csr_matrix(limits), csr_matrix((len(most), count - self._binary))]) if len(most) else None
        largest = float(np.abs(self._costs).max(initial=0.0)) or 1.0
        done = linprog(
            self._costs / largest,
            A_ub=rows,
            b_ub=most if len(most) else None,
            A_eq=equal,
            b_eq=flows.least,
            bounds=np.stack((np.zeros(count), self._open), axis=1),
            method="highs",
            options={"time_limit": seconds},
        )
        if done.status == 2:
            raise UnfitError
        if done.status == 1:
            return None
        assert done.status == 0, done.message
        done.fun *= largest
        done.lower.marginals = np.asarray(done.lower.marginals) * largest
        return done

    def _integer(self, upper: Floats, gap: float, seconds: float, tightening: float) -> Any:
        """Solve with whole numbers, among options and pairs that are open."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix

        used = np.flatnonzero(upper)
        number = np.full(len(upper), -1)
        number[used] = np.arange(len(used))
        flows = self._flows
        kept = number[flows.columns] >= 0
        where = (flows.rows[kept], number[flows.columns[kept]])
        constraints = [
            LinearConstraint(
                csr_matrix((flows.values[kept], where), (len(flows.least), len(used))), flows.least, flows.most
            )
        ]
        limits, most = self._limits(tightening)
        if len(most):
            own = used[used < self._binary]
            rows = np.zeros((len(most), len(used)))
            rows[:, : len(own)] = limits[:, own]
            constraints.append(LinearConstraint(csr_matrix(rows), -np.inf, most))
        done = milp(
            self._costs[used] * self._scale,
            integrality=(used < self._binary).astype(np.int64),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": seconds, "mip_rel_gap": gap, "presolve": True},
        )
        if done.x is not None:
            values = np.zeros(len(upper))
            values[used] = done.x
            done.x = values
        return done

    def _rounded(self, values: Floats) -> Choice | None:
        """Return the choice of the largest variable of each node, if it fits."""
        largest = [values[one:other].argmax() for one, other in itertools.pairwise(self._first)]
        options: Options = np.array(largest, dtype=np.int64)
        choice = self._graph.choice(options)
        return choice if np.isfinite(self._problem.seconds(choice)) and self._problem.fits(choice) else None
