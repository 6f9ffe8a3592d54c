"""engine/step_buffer.py: the buffer of a step says what its rows say."""

from __future__ import annotations

import numpy as np
from helpers.fake_steps import Loop, add, scheduler

from tersor.engine.request import Step
from tersor.engine.step_buffer import Layout, fill, prompt_places, tokens_of

PAGES, SPARE = 16, 8


def test_a_buffer_holds_every_row_of_every_step_and_padding_behind_them() -> None:
    plan = scheduler(max_step_tokens=12)
    for number in range(20):
        add(plan, f"{number}", [1 + number % 3] * (1 + 5 * number % 17), 3 + number % 4)
    loop, lines, mixed = Loop(plan), np.zeros((SPARE, PAGES), np.int32), 0
    loop.between = lambda: check(loop.steps[-1], lines)
    loop.run()
    mixed = sum(0 < step.decodes < len(step.rows) for step in loop.steps)
    assert mixed > 5 and any(step.decodes == len(step.rows) > 1 for step in loop.steps)


def check(step: Step, lines: np.ndarray) -> None:
    for request in step.grown:
        if request.pages:
            lines[request.slot, : len(request.pages)] = request.pages
    layout = Layout(step.tokens + 3, len(step.rows) + 2, PAGES)
    buffer = np.full(layout.size, 77, np.int32)
    fill(buffer, layout, step, lines, SPARE)
    views = {name: view.tolist() for name, view in layout.split(buffer).items()}
    at, tokens, starts, places, slots = 0, [], [0], [], []
    for row, length, pages in zip(step.rows, views["lengths"], views["pages"], strict=False):
        tokens += tokens_of(row)
        at += row.count
        starts.append(at)
        assert length == row.start + row.count and pages == lines[row.request.slot].tolist()
        if row.draws:
            places.append(at - 1)
            slots.append(row.request.slot)
    padding = len(step.rows) + 2 - len(places)
    assert views["tokens"] == [*tokens, 0, 0, 0] and views["starts"] == [*starts, at, at]
    assert views["lengths"][-2:] == [0, 0] and not any(map(any, views["pages"][-2:]))
    assert views["places"] == places + [0] * padding and views["slots"] == slots + [SPARE] * padding


def test_places_of_prompts_are_those_whose_next_token_is_asked_for() -> None:
    plan = scheduler(max_step_tokens=5, max_rows=5)
    add(plan, "asks", [1, 2, 3, 4, 5, 4, 3], prompt_logprobs=2)
    add(plan, "other", [3, 3, 3])
    loop = Loop(plan)
    found: list[tuple[list[int], list[int], list[int]]] = []
    loop.between = lambda: found.append(prompt_places(loop.steps[-1]))
    loop.run()
    assert found[:2] == [([0, 1, 2, 3, 4], [2, 3, 4, 5, 4], [2] * 5), ([0], [3], [2])]
    assert all(one == ([], [], []) for one in found[2:])
