"""Ten thousand random schedules: every request draws what it draws alone, and everything has one owner at any time."""

from __future__ import annotations

import random

import pytest
from helpers.fake_steps import END, VOCABULARY, Loop, solo

from tersor.engine.limits import Limits
from tersor.engine.params import SamplingParams
from tersor.engine.request import Request, continuations
from tersor.engine.scheduler import Scheduler

SCHEDULES = 10_000
PARTS = 10


def arrivals(draw: random.Random, limits: Limits) -> list[tuple[int, list[Request], int]]:
    """Return requests, by the turn in which they come, and in which their client leaves (mostly never)."""
    room = (limits.pages - 1) * limits.page_size
    prefixes = [[draw.randrange(VOCABULARY) for _ in range(draw.randrange(room // 2))] for _ in range(2)]
    found = []
    for number in range(draw.randrange(1, 6)):
        prompt = draw.choice(prefixes)[: draw.randrange(room)]
        prompt = prompt + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 5))]
        params = SamplingParams(
            n=draw.choice((1, 1, 1, 2, 3)),
            max_tokens=min(draw.randrange(1, 9), room + 1 - len(prompt)),
            prompt_logprobs=draw.choice((None, None, None, 1)),
        )
        requests = continuations(
            f"r{number}",
            prompt,
            params,
            stop_tokens=frozenset((END,)) if draw.random() < 0.5 else frozenset(),
            salt=draw.choice((None, None, "a")),
            priority=draw.choice((0, 0, 0, 1)),
            ahead=draw.random() < 0.9,
            expected_tokens=draw.choice((0, 0, 5)),
        )
        found.append((draw.randrange(8), requests, draw.choice((-1, -1, -1, -1, draw.randrange(15)))))
    return found


@pytest.mark.parametrize("part", range(PARTS))
def test_every_request_of_any_schedule_draws_what_it_draws_alone(part: int) -> None:
    preemptions = cached = dropped = ended = 0
    for number in range(part, SCHEDULES, PARTS):
        draw = random.Random(number)
        limits = Limits(
            pages=draw.randrange(5, 14),
            page_size=draw.choice((2, 4)),
            max_rows=draw.randrange(1, 9),
            max_step_tokens=draw.randrange(8, 33),
            context=draw.choice((24, 100)),
            share_prefixes=draw.random() < 0.9,
        )
        scheduler = Scheduler(limits)
        loop = Loop(scheduler, depth=draw.choice((1, 2, 2, 2, 3)))
        coming = [entry for entry in arrivals(draw, limits) if len(entry[1][0].prompt) < limits.context]
        turn, everybody = 0, [request for _, requests, _ in coming for request in requests]
        last = max((max(start, leave) for start, _, leave in coming), default=0)
        while turn <= last or scheduler.unfinished or loop.under_way:
            for start, requests, leave in coming:
                if start == turn:
                    for request in requests:
                        scheduler.add(request)
                if leave == turn:
                    scheduler.abort(requests[0].id)
            assert loop.turn() or turn <= last, f"schedule {number} stands still"
            turn += 1
            assert turn < 1000, f"schedule {number} does not end"
        for request in everybody:
            assert request.finish_reason is not None and request.state == "gone"
            alone = solo(request, request.limit)
            if request.finish_reason == "abort":
                assert request.output == alone[: len(request.output)], f"schedule {number}, {request.id}"
                dropped += 1
            else:
                assert request.output == alone, f"schedule {number}, {request.id}"
                ended += request.finish_reason == "stop"
            cached += request.num_cached
        cache = scheduler.cache
        assert cache.pages.free + cache.cached == cache.pages.usable
        preemptions += scheduler.preemptions
    assert min(preemptions, cached, dropped, ended) > 50  # of all that can happen, all does
