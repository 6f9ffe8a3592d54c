"""What a step is made of, one step ahead of what is read: rows, ends, and what is dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.fake_steps import END, Loop, add, planned, prompt_of, scheduler, solo

from tersor.engine.limits import Limits
from tersor.engine.outputs import ABORT, ERROR, LENGTH, STOP
from tersor.engine.params import SamplingParams
from tersor.engine.request import Request, Step, continuations
from tersor.engine.scheduler import Scheduler
from tersor.engine.stats import stats
from tersor.errors import InputError, TersorError


def test_decoding_rows_come_first_and_chunks_of_prompts_fill_the_budget() -> None:
    plan = scheduler(max_step_tokens=10)
    add(plan, "a", prompt_of(3, 1))
    assert planned(plan.schedule()) == [("a", 0, 3, True)]
    add(plan, "b", prompt_of(20, 2))
    add(plan, "c", prompt_of(4, 3))
    assert planned(plan.schedule()) == [("a", 3, 1, True), ("b", 0, 9, False)]
    step = plan.schedule()
    assert planned(step) == [("a", 4, 1, True), ("b", 9, 9, False)] and step is not None and step.decodes == 1
    step = plan.schedule()
    assert planned(step) == [("a", 5, 1, True), ("b", 18, 2, True), ("c", 0, 4, True)]
    assert step is not None and step.tokens == 7 and [row.request.id for row in step.drawing] == ["a", "b", "c"]
    plan.audit()


def test_no_more_requests_run_than_rows() -> None:
    plan = scheduler(max_rows=2)
    requests = [add(plan, name, prompt_of(2, place + 1)) for place, name in enumerate("abc")]
    loop = Loop(plan)
    loop.turn()
    assert [request.state for request in requests] == ["running", "running", "waiting"]
    assert {request.slot for request in requests[:2]} == {0, 1}
    loop.run()
    assert [request.output for request in requests] == [solo(request, request.limit) for request in requests]


def test_priority_goes_before_arrival() -> None:
    plan = scheduler(max_rows=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        add(plan, name, [1], 1, priority=priority)
    loop = Loop(plan)
    loop.run()
    assert [row.request.id for step in loop.steps for row in step.rows] == ["b", "c", "a"]


def test_another_order_is_taken() -> None:
    limits = Limits(pages=65, max_rows=1, context=100)
    plan = Scheduler(limits, order=lambda request: -len(request.prompt))
    for name, length in (("a", 1), ("b", 3), ("c", 2)):
        add(plan, name, prompt_of(length), 1)
    loop = Loop(plan)
    loop.run()
    assert [row.request.id for step in loop.steps for row in step.rows] == ["b", "c", "a"]


def test_a_last_state_is_one_row_of_a_prompt_as_long_as_the_context_and_counts_no_token() -> None:
    plan = scheduler(context=9, max_step_tokens=8)
    request = add(plan, "a", prompt_of(9), 5, embeds=True)
    with pytest.raises(InputError, match="the prompt has 10 tokens, and the context is 9"):
        add(plan, "b", prompt_of(10), embeds=True)
    loop = Loop(plan)
    loop.run()
    assert [planned(step) for step in loop.steps] == [[("a", 0, 8, False)], [("a", 8, 1, True)]]
    assert [step.embedding for step in loop.steps] == [[], [0]]
    assert request.finish_reason == STOP and stats(plan).generated_tokens == 0


def test_a_text_of_known_length_has_no_wasted_row() -> None:
    plan = scheduler()
    request = add(plan, "a", prompt_of(3), 3)
    loop = Loop(plan)
    loop.run()
    assert [planned(step) for step in loop.steps] == [[("a", 0, 3, True)], [("a", 3, 1, True)], [("a", 4, 1, True)]]
    assert request.finish_reason == LENGTH and len(request.output) == 3


def test_the_context_ends_a_text_without_a_wasted_row() -> None:
    plan = scheduler(context=6)
    request = add(plan, "a", prompt_of(3), None)
    loop = Loop(plan)
    loop.run()
    assert request.finish_reason == LENGTH and len(request.output) == 3 and len(loop.steps) == 3


def test_all_pages_are_the_context_where_they_hold_less() -> None:
    plan = scheduler(pages=3)
    request = add(plan, "a", prompt_of(3), None)
    Loop(plan).run()
    assert request.finish_reason == LENGTH and len(request.output) == 6


def run_to_the_end_token(plan: Scheduler) -> tuple[Request, Step, Step, list[int]]:
    """Schedule two steps of one request; what the first draws ends it."""
    request = add(plan, "a", prompt_of(4), 9, stop_tokens=frozenset((END,)))
    first, second = plan.schedule(), plan.schedule()
    assert first is not None and second is not None
    return request, first, second, [END]


def test_what_was_planned_after_an_end_token_is_dropped_and_its_pages_go_back_a_step_later() -> None:
    plan = scheduler()
    request, first, second, drawn = run_to_the_end_token(plan)
    assert plan.finish(first, drawn) == [0]
    assert request.finish_reason == STOP and request.output == [END] and plan.unfinished == 0
    plan.audit()
    assert len(request.pages) == 2 and plan.cache.available == 62
    assert plan.schedule() is None
    assert plan.finish(second, [3]) == []
    plan.audit()
    assert request.output == [END] and request.pages == [] and plan.cache.available == 64


def test_with_three_steps_under_way_pages_go_back_after_the_last() -> None:
    plan = scheduler()
    request, first, second, drawn = run_to_the_end_token(plan)
    third = plan.schedule()
    assert third is not None
    plan.finish(first, drawn)
    plan.finish(second, [1])
    plan.audit()
    assert len(request.pages) == 2
    plan.finish(third, [1])
    plan.audit()
    assert request.pages == []


def test_an_id_can_come_again_while_a_row_of_its_last_request_is_under_way() -> None:
    plan = scheduler()
    request, first, second, drawn = run_to_the_end_token(plan)
    plan.finish(first, drawn)
    again = add(plan, "a", prompt_of(4), 1)
    third = plan.schedule()
    assert third is not None and third.rows[0].request is again and again.slot != request.slot
    plan.audit()
    assert plan.finish(second, [1]) == [] and plan.finish(third, [5]) == [0]
    assert again.output == [5] and again.finish_reason == LENGTH


@pytest.mark.parametrize("reason", [STOP, ERROR])
def test_the_caller_ends_a_text_at_any_time_and_more_than_once(reason: str) -> None:
    plan = scheduler()
    request = add(plan, "a", prompt_of(4), 9)
    first, second = plan.schedule(), plan.schedule()
    assert first is not None and second is not None
    plan.finish(first, [2])
    plan.end(request, reason)
    plan.end(request, ABORT)
    plan.audit()
    assert plan.schedule() is None
    plan.finish(second, [3])
    plan.end(request, ABORT)
    plan.audit()
    assert (request.finish_reason, request.output, plan.unfinished) == (reason, [2], 0)


def test_an_abort_ends_all_continuations_wherever_they_are_and_no_id_is_an_error() -> None:
    plan = scheduler(max_rows=2, max_step_tokens=10)
    requests = continuations("a", prompt_of(9), SamplingParams(n=3, max_tokens=5))
    for request in requests:
        plan.add(request)
    other = add(plan, "b", prompt_of(3, 2), 2)
    loop = Loop(plan)
    loop.turn()
    assert [request.state for request in requests] == ["running", "delayed", "delayed"]
    plan.abort("a")
    plan.abort("a")
    plan.abort("nobody")
    plan.audit()
    loop.run()
    assert all(request.finish_reason == ABORT and not request.output for request in requests)
    assert other.output == solo(other, other.limit) and plan.cache.available == 64


def test_an_abort_between_planning_and_reading_takes_nothing_twice() -> None:
    plan = scheduler()
    request = add(plan, "a", prompt_of(4), 9)
    loop = Loop(plan)
    loop.between = lambda: plan.abort("a") if len(loop.steps) == 3 else None
    loop.run()
    assert request.finish_reason == ABORT and request.output == solo(request, request.limit)[: len(request.output)]


def test_a_token_whose_choice_needs_the_one_before_waits_for_it() -> None:
    plan = scheduler()
    held, free = add(plan, "a", prompt_of(6), 3, ahead=False), add(plan, "b", prompt_of(6, 2), 5)
    loop = Loop(plan)
    loop.run()
    assert [[row.request.id for row in step.rows] for step in loop.steps] == [
        ["a", "b"],
        ["b"],
        ["a", "b"],
        ["b"],
        ["a", "b"],
    ]
    assert held.output == solo(held, held.limit) and free.output == solo(free, free.limit)


def test_steps_are_finished_in_order_with_a_token_for_every_row_that_draws() -> None:
    plan = scheduler()
    add(plan, "a", prompt_of(4), 9)
    first, second = plan.schedule(), plan.schedule()
    assert first is not None and second is not None
    with pytest.raises(TersorError, match="in the order in which they were scheduled"):
        plan.finish(second, [1])
    with pytest.raises(TersorError, match="2 tokens are handed in for 1 rows that draw"):
        plan.finish(first, [1, 1])


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        (0, 4, "a: the prompt has no tokens"),
        (200, 4, "a: the prompt has 200 tokens, and the context is 200"),
        (10, 40, "a prompt of 10 tokens and up to 40 more need 13 pages of 4 tokens, and there are 12"),
        (49, None, "a prompt of 49 tokens and up to 1 more need 13 pages of 4 tokens, and there are 12"),
    ],
)
def test_what_can_never_fit_is_refused_alone(prompt: int, max_tokens: int | None, words: str) -> None:
    plan = scheduler(pages=13)
    other = add(plan, "b", prompt_of(3))
    with pytest.raises(InputError, match=words):
        add(plan, "a", prompt_of(prompt) if prompt else [], max_tokens)
    plan.audit()
    Loop(plan).run()
    assert plan.unfinished == 0 and other.output == solo(other, other.limit)


def test_what_just_fits_runs() -> None:
    plan = scheduler(pages=13)
    request = add(plan, "a", prompt_of(10), 39)
    Loop(plan).run()
    assert request.output == solo(request, request.limit) and len(request.output) == 39


@pytest.mark.parametrize("token", [-1, 1 << 32, None])
def test_a_prompt_that_is_not_made_of_tokens_is_refused_alone(token: Any) -> None:
    plan = scheduler()
    with pytest.raises(InputError, match="a: a token of the prompt is not a number from 0 to 2"):
        add(plan, "a", [1, token])
    assert plan.unfinished == 0 and plan.schedule() is None


def test_a_step_that_fails_takes_its_own_requests_along_and_nothing_of_it_is_found() -> None:
    plan = scheduler()
    failing = [add(plan, name, prompt_of(9, first), 5) for name, first in (("a", 1), ("b", 2))]
    step = plan.schedule()
    waiting = add(plan, "c", prompt_of(9), 5)
    loop = Loop(plan)
    assert plan.schedule() is not None and step is not None
    for row in step.rows:
        plan.end(row.request, ERROR)
    for under_way in list(plan.steps):
        assert plan.finish(under_way, [0] * len(under_way.drawing)) == []
    plan.audit()
    assert plan.cache.pages.free == 64 and all(request.finish_reason == ERROR for request in failing)
    loop.run()
    assert waiting.num_cached == 0 and waiting.output == solo(waiting, waiting.limit)


def test_stats_add_up() -> None:
    plan = scheduler(max_rows=2)
    add(plan, "a", prompt_of(9), 5)
    loop = Loop(plan)
    loop.run()
    for name in "bcd":
        add(plan, name, prompt_of(9), 5)
    for _ in range(3):
        loop.turn()
    found = stats(plan)
    assert (found.running, found.waiting, found.preemptions) == (2, 1, 0)
    assert (found.prompt_tokens, found.cached_tokens, found.generated_tokens) == (27, 16, 5 + 2 * 2)
    assert (found.pages_used, found.pages_cached, found.pages_free) == (4, 1, 60)
    assert found.pages_pinned == 0
    plan.pin(prompt_of(12))
    loop.run()
    assert stats(plan).pages_pinned == 2


def test_an_id_is_not_taken_twice() -> None:
    plan = scheduler()
    add(plan, "a", [1])
    with pytest.raises(InputError, match="a: there is a request of this id already"):
        add(plan, "a", [1])


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"pages": 1}, "there are 1 pages"),
        ({"context": 1}, "the context is 1 tokens"),
        ({"max_rows": 9, "max_step_tokens": 8}, "max_rows is 9 and max_step_tokens 8"),
        ({"max_rows": 0}, "max_rows is 0"),
    ],
)
def test_limits_that_let_nothing_run_are_an_error(limits: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        scheduler(**limits)


HARMS: dict[str, Callable[[Scheduler, Request], object]] = {
    "slots in use and free are": lambda plan, request: setattr(request, "slot", 5),
    "63 free, 2 held, 0 idle of 64 pages": lambda plan, request: plan.cache.release(request.pages[:1]),
    "counts 2 rows under way of 1": lambda plan, request: setattr(request, "in_flight", 2),
    "a is 7 tokens long, and 7 are known": lambda plan, request: request.output.append(1),
    "a has 6 tokens computed in 2 pages": lambda plan, request: setattr(request, "room", 4),
    "7 computed of 7 tokens": lambda plan, request: setattr(request, "computed", 7),
    "a is 6 tokens long": lambda plan, request: setattr(request, "length", 6),
    "a is running in the queue of those waiting": lambda plan, request: plan.admission.waiting.push(request),
    "0 requests have not ended, and 1 are": lambda plan, request: plan._live.clear() or setattr(plan, "unfinished", 0),
    "2 requests are counted that have not ended": lambda plan, request: setattr(plan, "unfinished", 2),
    "more logits than of 1024 tokens": lambda plan, request: setattr(plan.steps[-1].rows[0], "logits", 1033),
    "has ended and is counted": lambda plan, request: setattr(request, "finish_reason", STOP),
    "a step says that it has 7 tokens": lambda plan, request: setattr(plan.steps[-1], "tokens", 7),
    "a row ends at token 5, the next is 6": lambda plan, request: setattr(plan.steps[-1].rows[0], "count", 5),
    "computes more than one token": lambda plan, request: setattr(plan.steps[-1], "decodes", 1),
    "the rows that draw": lambda plan, request: plan.steps[-1].drawing.clear(),
    "which others read": lambda plan, request: plan.cache.publish(b"of others", request.pages[0]),
    "others wait for": lambda plan, request: request.announced.clear(),
}


@pytest.mark.parametrize("words", HARMS)
def test_an_audit_says_what_does_not_hold(words: str) -> None:
    plan = scheduler()
    request = add(plan, "a", prompt_of(6), 9)
    plan.schedule()
    plan.audit()
    HARMS[words](plan, request)
    with pytest.raises(TersorError, match=words):
        plan.audit()
