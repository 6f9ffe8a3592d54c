"""Ten thousand random schedules: every request draws what it draws alone, and everything has one owner at any time."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from helpers.fake_steps import END, VOCABULARY, Loop, solo

from tersor.engine.limits import Limits
from tersor.engine.outputs import ABORT, LENGTH, STOP
from tersor.engine.params import SamplingParams
from tersor.engine.request import GONE, Request, continuations
from tersor.engine.scheduler import Scheduler

SCHEDULES = 10_000
PARTS = 10


@dataclass
class Arrival:
    """A prompt: the turn in which it comes, in which its client leaves, and in which a stop text is found; -1 never."""

    requests: list[Request]
    turn: int
    leaves: int
    stops: int


def limits_of(draw: random.Random) -> Limits:
    """Return small ones, so that pages run out and prompts come in pieces."""
    rows = draw.randrange(1, 9)
    return Limits(
        pages=draw.randrange(6, 14),
        page_size=draw.choice((1, 2, 2, 4)),
        max_rows=rows,
        max_step_tokens=rows + draw.choice((2, 8, 16, 24)),
        max_prompt_logits=draw.choice((3, 1024, 1024)),
        context=draw.choice((24, 100)),
        share_prefixes=draw.random() < 0.9,
        stages=draw.choice((1, 1, 2, 3)),
    )


def arrivals(draw: random.Random, limits: Limits) -> list[Arrival]:
    """Return up to four prompts, most of which begin as another does."""
    room = min((limits.pages - 1) * limits.page_size, limits.context - 1)
    prefixes = [[draw.randrange(VOCABULARY) for _ in range(draw.randrange(max(room // 2, 1)))] for _ in range(2)]
    found = []
    for number in range(draw.randrange(1, 5)):
        prompt = draw.choice(prefixes)[: draw.randrange(room)]
        prompt = prompt + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 5))]
        params = SamplingParams(
            n=draw.choice((1, 1, 1, 2, 3)),
            max_tokens=min(draw.choice((1, 3, 6, 12, 16)), room + 1 - len(prompt)),
            prompt_logprobs=draw.choice((None, None, None, 1)),
        )
        requests = continuations(
            f"r{number}",
            prompt,
            params,
            stop_tokens=frozenset((END,)) if draw.random() < 0.5 else frozenset(),
            salt=draw.choice((None, None, "a")),
            priority=draw.choice((0, 0, 0, 1)),
            embeds=draw.random() < 0.15,
            ahead=draw.random() < 0.9,
            expected_tokens=draw.choice((0, 0, 5)),
        )
        turn = draw.randrange(4)
        leaves, stops = (draw.choice((-1, -1, -1, -1, turn + draw.randrange(9))) for _ in range(2))
        found.append(Arrival(requests, turn, leaves, stops))
    return found


def run(draw: random.Random, scheduler: Scheduler, coming: list[Arrival]) -> Loop:
    """Let everybody come, leave, and end; steps are read late, some tokens computed twice, and a prefix pinned."""
    stages = scheduler.limits.stages
    loop = Loop(scheduler, depth=draw.choice((1, 2, 2, 2, 3)) if stages == 1 else stages + 1)
    turn, last = 0, max(max(one.turn, one.leaves, one.stops) for one in coming)
    pinned, unpins = coming[0].requests[0], draw.choice((-1, -1, draw.randrange(1, 9)))

    def between() -> None:
        for one in coming:
            if one.leaves == turn:
                scheduler.abort(one.requests[0].id)
            if one.stops == turn:
                scheduler.end(one.requests[-1], STOP)

    loop.between = between
    if unpins > 0:
        scheduler.pin(pinned.prompt, pinned.salt)
    while turn <= last or scheduler.unfinished or loop.under_way:
        if turn == unpins:
            scheduler.unpin(pinned.prompt, pinned.salt)
        for one in coming:
            if one.turn == turn:
                for request in one.requests:
                    scheduler.add(request)
        assert loop.turn() or turn <= last, "nothing can run, and nothing is under way"
        turn += 1
        assert turn < 1000, "it does not end"
    return loop


@pytest.mark.parametrize("part", range(PARTS))
def test_every_request_of_any_schedule_draws_what_it_draws_alone(part: int) -> None:
    preemptions = cached = 0
    reasons = dict.fromkeys((ABORT, LENGTH, STOP), 0)
    for number in range(part, SCHEDULES, PARTS):
        draw = random.Random(number)
        limits = limits_of(draw)
        scheduler, coming = Scheduler(limits), arrivals(draw, limits)
        try:
            loop = run(draw, scheduler, coming)
        except Exception as error:
            raise AssertionError(f"schedule {number}") from error
        for one in coming:
            for request in one.requests:
                alone = solo(request, request.limit)
                cut = request.finish_reason == ABORT or one.stops >= 0
                assert request.state == GONE, f"schedule {number}"
                assert request.output == (alone[: len(request.output)] if cut else alone), f"schedule {number}"
                reasons[str(request.finish_reason)] += 1
                cached += request.num_cached
                if request.params.prompt_logprobs is not None and request.index == 0 and request.output:
                    given = [place for place in loop.device.given[request] if place < len(request.prompt) - 1]
                    assert given == list(range(len(request.prompt) - 1)), f"schedule {number}"
        cache = scheduler.cache
        assert cache.pages.free + cache.cached == cache.pages.usable
        preemptions += scheduler.preemptions
    assert min(preemptions, cached, *reasons.values()) > 100  # all that can happen did
