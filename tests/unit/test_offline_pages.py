"""Where pages are few: what the forecast foresees, and that planned runs are no slower than sorted prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers.fake_core import core, solo
from helpers.fake_steps import Loop, add, prompt_of, scheduler

from tersor.bench import throughput, workloads
from tersor.engine.batch_items import Item
from tersor.engine.forecast import Admission
from tersor.engine.groups import plan
from tersor.engine.limits import Limits
from tersor.engine.offline import OfflineEngine
from tersor.engine.outputs import RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.request import PREEMPTED, Request, Step

ALWAYS = 2**62
LENGTHS = (("a", 24), ("b", 12), ("c", 24))


@dataclass
class Launched:
    """A step of a model that does nothing."""

    step: Step
    logprobs: Any = None
    prompt_logprobs: Any = None
    states: Any = None

    def tokens(self) -> list[int]:
        return [5] * len(self.step.drawing)


class Timed:
    """A model that does nothing, and the milliseconds that one of 8B takes for its steps on an H200."""

    def __init__(self) -> None:
        self.milliseconds = 0.0

    def launch(self, step: Step, masks: Mapping[int, Any]) -> Launched:
        pages: dict[int, int] = {}
        for row in step.rows:
            for page in row.request.pages:
                pages[page] = pages.get(page, 0) + 1
        shared = [count for count in pages.values() if count > 1]
        own = sum(row.start + row.count for row in step.rows) - 64 * sum(shared)
        computing = max(1.45, 0.0205 * step.tokens + 0.6 * (step.tokens < 1024))
        self.milliseconds += 0.4 + computing + 0.0091 * max(0, own) / 300 + 0.005 * len(shared)
        return Launched(step)


@pytest.mark.parametrize(
    ("name", "requests", "pages", "sizes"),
    [
        ("mixed-density", 80, 400, {"long": 1000, "short": 100}),
        ("mixed-density", 80, 250, {"long": 1000, "short": 100}),
        ("sampling", 6, 100, {"prompt": 1000, "output": 300}),
        ("tree", 100, 200, {"output": 100}),
        ("micro", 40, 60, {}),
    ],
)
def test_a_plan_is_never_slower_than_sorted_prompts(
    name: str, requests: int, pages: int, sizes: dict[str, float]
) -> None:
    work = workloads.make(name, requests=requests, **sizes)
    limits = Limits(pages=pages, context=throughput.context_of(work))
    took, reuse = {}, {}
    for order in ("planned", "sorted"):
        model = Timed()
        reuse[order] = throughput.measure(model, limits, work, order, "none", "none").reuse or 0
        took[order] = model.milliseconds
    assert took["planned"] < 1.02 * took["sorted"]
    assert reuse["planned"] >= reuse["sorted"]


def test_long_answers_begin_spread_over_a_life_where_many_follow() -> None:
    made = plan([[i] * 32 for i in range(400)], 1000)
    admission = Admission(made, 1000, 1000)  # 58 of 17 pages fit at their ends: 7 waves of 1,000 steps
    position, steps, running, began = 0, 0, dict[int, int](), list[int]()
    while position < 400 or running:
        began.append(-position)
        while position < 400 and admission.fits(position) and not admission.crowds(position):
            admission.admit(position)
            running[position], position = 0, position + 1
        began[-1] += position
        for one in list(running):
            admission.drew(one, 20)
            running[one] += 20
            if running[one] == 1000:
                admission.end(one)
                del running[one]
        steps += 20
    assert max(began[:50]) < 10
    assert steps < 0.85 * 7000


def test_pages_last_as_long_as_is_foreseen() -> None:
    draw = random.Random(5)
    for _ in range(60):
        prompts = [[i] + [7] * draw.randrange(0, 20) for i in range(9)]
        most = np.array([draw.randrange(1, 60) for _ in prompts])
        made = plan(prompts, most, page=4)
        most = most[made.order]
        admission = Admission(made, draw.randrange(20, 100), most)
        for position in range(8):
            admission.admit(position)
        needed = [
            sum(-(-int(length + moment) // 4) for length, end in zip(made.lengths, most, strict=True) if end >= moment)
            for moment in range(60)
        ]
        lasts = admission.lasts(8)
        assert all(pages <= admission.pages for pages in needed[: lasts + 1]) or not lasts
        if lasts == ALWAYS:
            assert admission.high_water(8) <= admission.pages
        else:
            assert max(needed[: lasts + 2]) > admission.pages - 9  # less than a page a request too early


def test_what_ends_before_it_draws_foretells_no_lengths() -> None:
    admission = Admission(plan([[1] * 8, [2] * 8], 100), 100, 100)
    admission.admit(0)
    admission.end(0)
    assert admission.lengths.ratio == 1
    admission.admit(1)
    admission.drew(1, 50)
    admission.end(1)
    assert admission.lengths.ratio == pytest.approx(0.5, abs=0.01)


def test_continuations_share_the_full_pages_of_their_prompt_and_grow_side_by_side() -> None:
    made = plan([[1] * 11], [30], page=4)
    admission = Admission(made, 100, 30, rows=3)
    assert admission.high_water(0) == 2 + 3 * 4  # 8 tokens together, 3 and 10 drawn each
    admission.admit(0)
    admission.stands(0, 2, 6)  # one has ended, or lost its pages
    assert admission.high_water() == 2 + 2 * 4
    admission.lost(1)
    assert admission.returns(0, 17)


def test_what_does_not_fit_is_admitted_where_few_rows_run_and_not_where_many_do() -> None:
    for others, pays in ((8, True), (90, False)):
        made = plan([[i] * 6 for i in range(others + 200)], 400, page=4)
        admission = Admission(made, 102 * others + 50, 400)
        for position in range(others):
            admission.admit(position)
        assert not admission.fits(others)
        assert admission.pays(others) == pays


def test_who_lost_its_pages_asks_before_it_has_some_again_unless_nobody_has_any() -> None:
    engine, asked = scheduler(pages=11), list[str]()

    def never(request: Request, found: int) -> bool:
        asked.append(request.id)
        return False

    engine.admission.may_return = never
    old, _, young = (add(engine, name, prompt_of(3, 8 + i), most) for i, (name, most) in enumerate(LENGTHS))
    loop = Loop(engine)
    while old.finish_reason is None:
        loop.turn()
    assert engine.preemptions == 1 and set(asked) == {"c"} and young.state == PREEMPTED
    loop.run()
    assert young.finish_reason is not None and engine.preemptions == 1


@pytest.mark.parametrize("n", [1, 3])
def test_requests_that_lose_their_pages_draw_what_they_draw_alone(n: int) -> None:
    draw = random.Random(3)
    engine = core(pages=24)
    items = [
        Item(
            str(i),
            np.array([20 + i % 7] * 5 + [20 + i], np.int32),
            SamplingParams(n=n, max_tokens=draw.randrange(9, 50)),
        )
        for i in range(30)
    ]
    found = {}
    for output in OfflineEngine(engine).run(items, lambda: False):
        engine.scheduler.audit()
        assert isinstance(output, RequestOutput)
        found[output.request_id] = [one.token_ids for one in output.outputs]
    assert engine.scheduler.preemptions
    for item in items:
        assert item.params is not None and item.params.max_tokens is not None
        alone = [solo(item.tokens.tolist(), item.params.max_tokens, index) for index in range(n)]
        assert found[item.key] == alone
    assert not engine.scheduler.cache.pinned
