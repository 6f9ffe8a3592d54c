"""Who shares pages, who waits for them, and who gives them back when they run out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.fake_steps import END, Loop, add, planned, prompt_of, scheduler, solo

from tersor.engine.admission import Admission
from tersor.engine.outputs import STOP
from tersor.engine.pages import Pages
from tersor.engine.params import SamplingParams
from tersor.engine.prefix import PrefixCache
from tersor.engine.request import DELAYED, GONE, LEAVING, PREEMPTED, RUNNING, WAITING, Request, continuations
from tersor.engine.scheduler import Scheduler


def right(*requests: Request) -> bool:
    """Whether requests drew what they draw alone."""
    return all(request.output == solo(request, request.limit) for request in requests)


def rows_of(loop: Loop, request: Request) -> list[tuple[int, int]]:
    """First token and number of tokens of all rows of a request."""
    return [(row.start, row.count) for step in loop.steps for row in step.rows if row.request is request]


def test_full_pages_are_found_again_and_the_last_token_is_always_computed() -> None:
    plan = scheduler()
    first = add(plan, "a", prompt_of(8), 2)
    loop = Loop(plan)
    loop.run()
    same, longer = add(plan, "b", prompt_of(8), 2), add(plan, "c", prompt_of(11), 2)
    loop.run()
    assert rows_of(loop, same) == [(4, 4), (8, 1)] and same.num_cached == 4
    assert rows_of(loop, longer) == [(8, 3), (11, 1)] and longer.num_cached == 8
    assert first.num_cached == 0 and right(first, same, longer)


def test_what_was_drawn_is_found_by_the_next_turn_of_a_conversation() -> None:
    plan = scheduler()
    first = add(plan, "a", prompt_of(6), 7)
    loop = Loop(plan)
    loop.run()
    second = add(plan, "b", [*first.prompt, *first.output, 3], 2)
    loop.run()
    assert second.num_cached == 12 and right(first, second)


def test_other_salts_find_nothing() -> None:
    plan = scheduler()
    requests = [add(plan, name, prompt_of(9), 2, salt=salt) for name, salt in (("a", None), ("b", "x"), ("c", ""))]
    loop = Loop(plan)
    loop.turn()
    assert all(request.state == RUNNING for request in requests)
    loop.run()
    late = add(plan, "d", prompt_of(9), 2, salt="x")
    loop.run()
    assert [request.num_cached for request in (*requests, late)] == [0, 0, 0, 8] and right(*requests, late)


def test_continuations_share_the_full_pages_of_their_prompt() -> None:
    plan = scheduler()
    requests = continuations("a", prompt_of(11), SamplingParams(n=3, max_tokens=4))
    for request in requests:
        plan.add(request)
    loop = Loop(plan)
    for _ in range(3):
        loop.turn()
    assert requests[0].pages[:2] == requests[1].pages[:2] == requests[2].pages[:2]
    assert [plan.cache.pages.holders[page] for page in requests[0].pages] == [3, 3, 1, 1][: len(requests[0].pages)]
    loop.run()
    assert [rows_of(loop, request)[0] for request in requests] == [(0, 11), (8, 3), (8, 3)] and right(*requests)


def test_without_sharing_continuations_of_one_prompt_share_alone() -> None:
    plan = scheduler(share_prefixes=False)
    requests = continuations("a", prompt_of(9), SamplingParams(n=2, max_tokens=2))
    for request in requests:
        plan.add(request)
    other = add(plan, "b", prompt_of(9), 2)
    Loop(plan).run()
    assert [request.num_cached for request in (*requests, other)] == [0, 8, 0] and right(*requests, other)


def test_who_begins_as_another_waits_for_its_pages_and_nobody_behind_it_does() -> None:
    plan = scheduler()
    first, same, other = add(plan, "a", prompt_of(9)), add(plan, "b", prompt_of(10)), add(plan, "c", prompt_of(9, 2))
    loop = Loop(plan)
    loop.turn()
    assert (first.state, same.state, other.state) == (RUNNING, DELAYED, RUNNING)
    loop.run()
    assert rows_of(loop, same)[0] == (8, 2) and right(first, same, other)
    assert [request.id for request in loop.steps[2].grown] == ["b"]  # the step after the first was read


def test_who_waits_for_pages_goes_on_when_nobody_computes_them_any_more() -> None:
    plan = scheduler()
    add(plan, "a", prompt_of(9))
    same = add(plan, "b", prompt_of(9))
    step = plan.schedule()
    assert same.state == DELAYED and plan.schedule() is not None
    plan.abort("a")
    assert step is not None and plan.finish(step, [1]) == [] and same.state == DELAYED
    plan.finish(plan.steps[0], [1])
    assert same.state == WAITING and planned(plan.schedule()) == [("b", 0, 9, True)]
    plan.audit()


def test_who_has_waited_for_a_page_does_not_wait_for_it_again() -> None:
    plan = scheduler()
    add(plan, "a", prompt_of(9))
    same = add(plan, "b", prompt_of(9))
    loop = Loop(plan)
    loop.turn()
    plan.abort("a")
    sooner = add(plan, "c", prompt_of(9), priority=-1)
    assert same.state == DELAYED
    loop.turn()
    loop.turn()
    assert sooner.state == RUNNING and same.state == RUNNING
    loop.run()
    assert right(same, sooner)


def test_it_waits_again_for_a_later_page() -> None:
    plan = scheduler()
    whole = prompt_of(17)
    first, second, third = add(plan, "a", whole[:9]), add(plan, "b", whole), add(plan, "c", [*whole[:16], 7])
    loop = Loop(plan)
    loop.run()
    assert [rows_of(loop, request)[0] for request in (first, second, third)] == [(0, 9), (8, 9), (16, 1)]
    assert right(first, second, third)


def test_log_probabilities_of_a_prompt_need_every_token_of_it() -> None:
    plan = scheduler(max_step_tokens=8)
    first = add(plan, "a", prompt_of(11), 2)
    loop = Loop(plan)
    loop.run()
    asking = continuations("b", prompt_of(11), SamplingParams(n=2, max_tokens=2, prompt_logprobs=0))
    for request in asking:
        plan.add(request)
    loop.run()
    assert asking[0].num_cached == 0 and asking[1].num_cached == 8 and right(first, *asking)
    logits = [row.logits for step in loop.steps for row in step.rows if row.request is asking[0]]
    assert logits == [8, 3, 1]


def test_a_step_gives_logits_of_a_few_tokens_of_prompts_and_fills_up_with_others() -> None:
    plan = scheduler(max_prompt_logits=5, max_step_tokens=20)
    asking = [add(plan, name, prompt_of(8, ord(name)), 1, prompt_logprobs=0) for name in "ab"]
    other = add(plan, "c", prompt_of(30, 3), 1)
    loop = Loop(plan)
    loop.run()
    assert [[(row.request.id, row.count, row.logits) for row in step.rows] for step in loop.steps] == [
        [("a", 5, 5), ("c", 15, 0)],
        [("a", 3, 3), ("b", 2, 2), ("c", 15, 1)],
        [("b", 5, 5)],
        [("b", 1, 1)],
    ]
    assert right(*asking, other)


def test_log_probabilities_are_given_once_where_tokens_of_the_prompt_are_computed_twice() -> None:
    plan = scheduler(max_rows=1, max_step_tokens=7)
    request = add(plan, "a", prompt_of(11), 2, prompt_logprobs=0)
    loop = Loop(plan, depth=1)
    loop.turn()
    request.computed = 4  # as one that has lost its pages
    few, plan.limits = plan.limits, replace(plan.limits, max_step_tokens=1)
    loop.turn()
    plan.limits = few
    loop.run()
    rows = [(row.start, row.count, row.logits) for step in loop.steps for row in step.rows]
    assert rows == [(0, 7, 7), (4, 1, 0), (5, 6, 4), (11, 1, 1)] and right(request)


def test_a_pinned_prefix_is_there_whatever_ran_in_between() -> None:
    plan = scheduler(pages=9)
    plan.pin(prompt_of(8))
    loop = Loop(plan)
    for name, first in (("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 1)):
        late = add(plan, name, prompt_of(17, first) if name != "e" else prompt_of(9), 3)
        loop.run()
    assert late.num_cached == 8
    plan.unpin(prompt_of(8))
    add(plan, "f", prompt_of(29, 5), 3)
    loop.run()
    late = add(plan, "g", prompt_of(9), 3)
    loop.run()
    assert late.num_cached == 0


def test_a_pin_does_not_keep_a_request_from_running_alone() -> None:
    plan = scheduler(pages=9)
    plan.pin(prompt_of(16), "x")
    loop = Loop(plan)
    add(plan, "a", prompt_of(16), 1, salt="x")
    loop.run()
    assert plan.cache.pinned == 4
    at_once, growing = add(plan, "b", prompt_of(29, 2), 3), add(plan, "c", prompt_of(3, 3), 29)
    loop.run()
    assert right(at_once, growing) and plan.cache.pinned == 0


def running_out(**fields: frozenset[int]) -> tuple[Scheduler, list[Request]]:
    """Three requests that fill all seven pages in the sixth step, the last with most to compute."""
    plan = scheduler(pages=8)
    lengths = {"a": 3, "b": 3, "c": 7}
    return plan, [add(plan, name, prompt_of(lengths[name], ord(name)), 12, **fields) for name in lengths]


def test_the_victim_is_the_younger_one_with_least_to_compute_and_goes_before_all_who_wait() -> None:
    plan, (oldest, victim, youngest) = running_out()
    loop = Loop(plan)
    for _ in range(7):
        loop.turn()
    assert loop.steps[-1].preempted == [victim] and plan.preemptions == 1
    assert (oldest.state, victim.state, youngest.state) == (RUNNING, PREEMPTED, RUNNING)
    assert len(victim.output) == 6  # what was under way when it lost its pages is kept
    soon = add(plan, "d", [ord("d")], 1, priority=-1)
    loop.run()
    assert next(request for step in loop.steps[7:] for request in step.grown if request in (victim, soon)) is victim
    assert right(oldest, victim, youngest, soon)
    assert sum(len(step.preempted) for step in loop.steps) == plan.preemptions


def test_what_a_victim_had_computed_is_found_again_and_does_not_count_as_cached() -> None:
    plan = scheduler(pages=8)
    oldest, victim = add(plan, "a", prompt_of(3, 8), 8), add(plan, "b", prompt_of(11, 9), 12)
    loop = Loop(plan)
    loop.run()
    assert plan.preemptions == 1 and rows_of(loop, victim)[6:8] == [(12, 5), (17, 1)] and right(oldest, victim)
    assert victim.num_cached == 0 and (plan.prompt_tokens, plan.cached_tokens) == (14, 0)


def test_the_oldest_loses_nothing_and_a_younger_one_gives_way_itself() -> None:
    plan = scheduler(pages=5)
    oldest, younger = add(plan, "a", prompt_of(2, 8), 14), add(plan, "b", prompt_of(3, 9), 13)
    loop = Loop(plan)
    loop.run()
    preempted = [request for step in loop.steps for request in step.preempted]
    assert preempted and set(preempted) == {younger} and right(oldest, younger)
    assert len(rows_of(loop, oldest)) == 14  # a prompt and 13 tokens, none of them twice


def test_a_token_under_way_can_end_one_that_has_lost_its_pages() -> None:
    plan, (_, victim, _) = running_out(stop_tokens=frozenset((END,)))
    steps = [plan.schedule()]
    for _ in range(6):
        steps.append(plan.schedule())
        before = steps[-2]
        assert before is not None
        ends = victim.state == PREEMPTED
        drawn = [END if ends and row.request is victim else 1 for row in before.drawing]
        plan.finish(before, drawn)
        plan.audit()
    assert (victim.state, victim.finish_reason, victim.output[-1]) == (GONE, STOP, END)
    assert plan.unfinished == 2 and not plan.admission.preempted


def test_a_client_can_leave_while_its_request_has_lost_its_pages() -> None:
    plan, (oldest, victim, youngest) = running_out()
    loop = Loop(plan)
    loop.between = lambda: plan.abort("b") if victim.state == PREEMPTED else None
    loop.run()
    assert victim.finish_reason == "abort" and right(oldest, youngest)


def test_pages_of_a_request_that_leaves_are_waited_for_and_nobody_is_preempted() -> None:
    plan = scheduler(pages=5)
    leaving, growing = add(plan, "a", prompt_of(3, 8), 6), add(plan, "b", prompt_of(3, 9), 12)
    loop = Loop(plan)
    for _ in range(6):
        loop.turn()
    assert leaving.state == LEAVING and plan.cache.available == 0 and growing.computed == growing.room
    assert plan.schedule() is None
    loop.run()
    assert plan.preemptions == 0 and right(leaving, growing)


def test_one_whose_tokens_are_not_all_known_does_not_begin_again() -> None:
    admission = Admission(PrefixCache(Pages(9, 4)))
    (request,) = continuations("a", [1, 2], SamplingParams())
    request.state, request.length, request.in_flight = PREEMPTED, 2, 1
    admission.add(request)
    assert admission.next(0, alone=True) is None
    request.in_flight = 0
    assert admission.next(0, alone=True) == (request, [])


def test_who_waits_for_a_page_is_woken_by_the_one_that_computes_it_alone() -> None:
    cache = PrefixCache(Pages(3, 4))
    admission = Admission(cache)
    early, other, late, waits = continuations("a", [1, 2, 3, 4, 5], SamplingParams(n=4))
    for place, request in enumerate((early, other, late, waits)):
        request.length, request.order, request.publish_at = 5, (0, place), 4
    admission.add(early)
    assert admission.next(0, alone=True) == (early, [])
    admission.begin(early, [])
    other.pages = cache.take(1)
    admission.publish(other, 4)
    cache.release(other.pages)
    cache.release(cache.take(2))  # what was published is gone, and `early` has not been told
    admission.add(late)
    assert admission.next(0, alone=True) == (late, [])
    admission.begin(late, [])
    admission.add(waits)
    assert admission.next(0, alone=True) is None and waits.state == DELAYED
    admission.withdraw(early)
    assert waits.state == DELAYED
    admission.withdraw(late)
    assert waits.state == WAITING


def test_a_prompt_is_computed_ahead_also_where_tokens_are_not() -> None:
    plan = scheduler(max_step_tokens=8)
    request = add(plan, "a", prompt_of(20), 3, ahead=False)
    assert [planned(plan.schedule()) for _ in range(3)] == [
        [("a", 0, 8, False)],
        [("a", 8, 8, False)],
        [("a", 16, 4, True)],
    ]
    assert plan.schedule() is None and request.in_flight == 3


@pytest.mark.parametrize(("expected", "together"), [(0, True), (12, False)])
def test_room_is_kept_for_the_tokens_that_are_expected(expected: int, together: bool) -> None:
    plan = scheduler(pages=7)
    requests = []
    for name in "ab":
        requests += continuations(name, [ord(name)], SamplingParams(max_tokens=16), expected_tokens=expected)
        plan.add(requests[-1])
    loop = Loop(plan)
    loop.turn()
    assert (requests[1].state == RUNNING) == together
    loop.run()
    assert (plan.preemptions > 0) == together and right(*requests)


def test_room_is_kept_for_one_more_page_of_everybody() -> None:
    plan = scheduler(pages=4)
    first, second = add(plan, "a", prompt_of(3, 8), 9), add(plan, "b", prompt_of(3, 9), 9)
    loop = Loop(plan)
    loop.turn()
    assert (first.state, second.state) == (RUNNING, WAITING)
    loop.run()
    assert plan.preemptions == 0 and right(first, second)


def test_a_prompt_in_pieces_can_be_a_victim() -> None:
    plan = scheduler(pages=9, max_rows=2, max_step_tokens=2)
    oldest, younger = add(plan, "a", prompt_of(2, 8), 19), add(plan, "b", prompt_of(17, 9), 2)
    loop = Loop(plan)
    while younger.state != PREEMPTED:
        loop.turn()
    assert len(loop.steps[-1].rows) == 1 and 0 < len(rows_of(loop, younger)) < 17
    loop.run()
    assert right(oldest, younger) and len(rows_of(loop, oldest)) == 19


def test_a_request_that_finds_no_pages_yet_is_not_overtaken() -> None:
    plan = scheduler(pages=9)
    running, large = add(plan, "a", prompt_of(15, 7), 6), add(plan, "b", prompt_of(25, 8), 2)
    small = add(plan, "c", [9], 1)
    loop = Loop(plan)
    loop.turn()
    assert (running.state, large.state, small.state) == (RUNNING, WAITING, WAITING)
    loop.run()
    assert planned(loop.steps[-1]) != [] and right(running, large, small)


def test_an_audit_finds_who_waits_for_nothing() -> None:
    plan = scheduler()
    add(plan, "a", prompt_of(9))
    same = add(plan, "b", prompt_of(9))
    plan.schedule()
    plan.audit()
    same.state = WAITING
    with pytest.raises(Exception, match="b is waiting and waits for a page that nobody computes"):
        plan.audit()
