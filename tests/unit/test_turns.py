"""engine/turns.py: of requests that decode, a share is in each of the steps that are under way at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from helpers.fake_steps import Loop, add, prompt_of, scheduler, solo

from tersor.engine.request import Request, Step
from tersor.planner.parts import Workload
from tersor.planner.served import under_way
from tersor.planner.ways import DECODE, Phase


def loop_of(stages: int, **limits: int) -> Loop:
    return Loop(scheduler(stages=stages, **limits), depth=stages + 1)


def rows(step: Step) -> set[str]:
    return {row.request.id for row in step.rows[: step.decodes]}


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_who_decodes_is_in_every_pth_step_and_each_step_has_a_pth(stages: int) -> None:
    loop = loop_of(stages, max_rows=12, pages=200)
    requests = [add(loop.scheduler, f"r{number}", prompt_of(2, number), 12) for number in range(3 * stages)]
    loop.run()
    decoding = [step for step in loop.steps if step.decodes]
    full = decoding[: 8 * stages]
    assert [len(step.rows) for step in full] == [3] * len(full)  # the burst of prompts is dealt out at once
    counted = Phase.of(DECODE, Workload(batch=3 * stages), under_way(stages, 3 * stages, (DECODE,)))
    assert counted.tokens == 3  # which is what a plan counts with
    for one, other in zip(full, full[stages:], strict=False):
        assert rows(one) == rows(other)
    for request in requests:
        assert request.output == solo(request, request.limit)


def test_no_step_begins_with_a_token_that_a_later_stage_still_draws() -> None:
    stages = 3
    loop = loop_of(stages, max_rows=8, pages=80)
    unread: dict[str, int] = {}

    def look() -> None:
        if loop.steps:
            number = len(loop.steps) - 1
            for row in loop.steps[-1].rows:
                if row.start + row.count > row.request.known and row.request.id in unread:
                    assert number - unread[row.request.id] >= stages or unread[row.request.id] == number
            unread.update({row.request.id: number for row in loop.steps[-1].drawing})

    loop.between = look
    for number in range(7):
        add(loop.scheduler, f"r{number}", prompt_of(3 + number, number), 5 + 2 * number)
    loop.run()
    assert len(unread) == 7


def test_a_request_alone_goes_on_a_step_at_a_time() -> None:
    loop = loop_of(3)
    request = add(loop.scheduler, "alone", prompt_of(5), 6)
    loop.run()
    assert len(loop.steps) == 6 and request.output == solo(request, request.limit)


def test_prompts_go_through_in_pieces_that_follow_each_other() -> None:
    loop = loop_of(2, max_step_tokens=8, max_rows=4)
    add(loop.scheduler, "long", prompt_of(40), 2)
    loop.run()
    pieces = [step.rows[0] for step in loop.steps[:5]]
    assert [(row.start, row.count) for row in pieces] == [(start, 8) for start in range(0, 40, 8)]
    assert all(one.start + one.count == other.start for one, other in pairwise(pieces))


def test_who_lost_its_pages_begins_again_when_its_last_token_is_known() -> None:
    loop = loop_of(2, pages=8, max_rows=4, share_prefixes=False)
    seen: list[Request] = []

    def look() -> None:
        for request in loop.steps[-1].grown if loop.steps else ():
            if request.computed and request in seen:
                assert request.known + 1 >= request.length
        seen.extend(loop.steps[-1].preempted if loop.steps else ())

    loop.between = look
    requests = [add(loop.scheduler, f"r{number}", prompt_of(5, number), 14) for number in range(3)]
    loop.run()
    assert loop.scheduler.preemptions and seen
    for request in requests:
        assert request.output == solo(request, request.limit)
