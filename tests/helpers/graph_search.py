"""The best choice of a problem without limits: exact, by taking one block after the other out of it."""

from __future__ import annotations

import itertools

import numpy as np

from tersor.planner.problem import Choice, Floats, Problem


def best(problem: Problem) -> Choice:
    """Return the choice that takes least time; limits are not looked at, ties are kept."""
    variable = {block.name: block.tie or block.name for block in problem.blocks}
    sizes = {variable[block.name]: len(block.options) for block in problem.blocks}
    tables: list[tuple[tuple[str, ...], Floats]] = []
    for block in problem.blocks:
        tables.append(((variable[block.name],), block.seconds))
    for edge in problem.edges:
        source, target = variable[edge.source], variable[edge.target]
        tables.append(((source,), np.diag(edge.seconds)) if source == target else ((source, target), edge.seconds))
    taken: list[tuple[str, tuple[str, ...], np.ndarray]] = []
    left = set(sizes)
    while left:
        near = {name: {other for names, _ in tables if name in names for other in names} for name in left}
        name = min(left, key=lambda one: (np.prod([float(sizes[other]) for other in near[one]]), one))
        names = (name, *sorted(near[name] - {name}))
        joint = np.zeros([sizes[other] for other in names])
        for mine, table in [item for item in tables if name in item[0]]:
            order = sorted(range(len(mine)), key=lambda place: names.index(mine[place]))
            shape = [sizes[other] if other in mine else 1 for other in names]
            joint = joint + np.transpose(table, order).reshape(shape)
        tables = [item for item in tables if name not in item[0]]
        tables.append((names[1:], joint.min(axis=0)))
        taken.append((name, names[1:], joint.argmin(axis=0)))
        left.remove(name)
    picked: dict[str, int] = {}
    for name, others, index in reversed(taken):
        picked[name] = int(index[tuple(picked[other] for other in others)])
    return Choice({block.name: picked[variable[block.name]] for block in problem.blocks})


def brute(problem: Problem) -> Choice | None:
    """Return the best choice that fits, of all, or `None` where none fits."""
    found: tuple[float, Choice | None] = (np.inf, None)
    names = [block.name for block in problem.blocks]
    for options in itertools.product(*(range(len(block.options)) for block in problem.blocks)):
        choice = Choice(dict(zip(names, options, strict=True)))
        seconds = problem.seconds(choice)
        if seconds < found[0] and problem.fits(choice):
            found = (seconds, choice)
    return found[1]
