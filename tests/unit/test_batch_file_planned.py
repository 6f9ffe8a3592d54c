"""An engine of single requests answers a batch: in the plan's order, within its pages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.batches import MIXED, Echo, go, write

from tersor.engine.batch_items import Item
from tersor.engine.groups import plan
from tersor.engine.outputs import CompletionOutput, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.planned import PlannedEngine
from tersor.errors import InputError, TersorError


class Steps:
    """Draws a token of every request in turn; counts the pages that they use together."""

    def __init__(self, page: int = 4) -> None:
        self.page, self.begun, self.aborted = page, list[str](), list[str]()
        self.running: dict[str, RequestOutput] = {}
        self.most_running = self.most_pages = 0

    async def generate(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, *, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        final = Echo().answer(Item(request_id, np.array(prompt_token_ids, np.int32), params))
        assert isinstance(final, RequestOutput)
        self.begun.append(request_id)
        if final.error:
            raise InputError(final.error)
        try:
            length = max(len(one.token_ids) for one in final.outputs)
            for count in range(1, length + 1):
                outputs = [CompletionOutput(one.index, "", one.token_ids[:count]) for one in final.outputs]
                self.running[request_id] = RequestOutput(request_id, None, list(prompt_token_ids), outputs)
                self._count()
                await asyncio.sleep(0)
                yield self.running[request_id] if count < length else final
        finally:
            self.running.pop(request_id, None)

    def _count(self) -> None:
        pages = set()
        for name, output in self.running.items():
            prompt = tuple(output.prompt_token_ids)
            text = (*prompt, *(-1 - i for i in range(sum(len(one.token_ids) for one in output.outputs))))
            for start in range(0, len(text), self.page):
                whole = start + self.page < len(prompt)
                pages.add(text[: start + self.page] if whole else (name, start))
        self.most_pages = max(self.most_pages, len(pages))
        self.most_running = max(self.most_running, len(self.running))

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def some_items(count: int) -> list[Item]:
    """Prompts of which some begin alike, in a random order."""
    draw = random.Random(3)
    items = [
        Item(str(i), np.array([1 + i // 4] * 20 + [1 + i % 4] * 3, np.int32), SamplingParams(max_tokens=1 + i % 30))
        for i in range(count)
    ]
    draw.shuffle(items)
    return items


def test_a_batch_is_answered_as_by_an_engine_of_batches(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "in.jsonl", MIXED)
    go(tmp_path / "one")
    engine = PlannedEngine(Steps(), pages=100, context=64, most_running=8, page=4)
    report = go(tmp_path / "two", engine)
    assert (report.progress.done, report.progress.failed) == (50, 8)
    one, two = (sorted((tmp_path / name / "out.jsonl").read_bytes().splitlines()) for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("pages", [20, 40, 200])
def test_requests_begin_in_the_order_of_the_plan_and_never_need_more_pages_than_there_are(pages: int) -> None:
    items, steps = some_items(80), Steps()
    engine = PlannedEngine(steps, pages=pages, context=64, most_running=24, page=4)
    answers = [answer.request_id for answer in engine.run(items, lambda: False)]
    assert sorted(answers) == sorted(item.key for item in items)
    planned = plan([item.tokens for item in items], [item.params.max_tokens for item in items if item.params], page=4)
    assert steps.begun == [items[index].key for index in planned.order]
    assert pages / 3 < steps.most_pages <= pages or steps.most_running == 24


def test_a_request_that_is_too_large_for_all_pages_runs_alone() -> None:
    steps = Steps()
    engine = PlannedEngine(steps, pages=2, context=64, most_running=8, page=4)
    assert len(list(engine.run(some_items(10), lambda: False))) == 10
    assert steps.most_running == 1


def test_a_wish_to_stop_finishes_what_runs() -> None:
    steps, answers = Steps(), list[str]()
    engine = PlannedEngine(steps, pages=1000, context=64, most_running=6, page=4)
    for answer in engine.run(some_items(60), lambda: len(answers) >= 5):
        answers.append(answer.request_id)
    assert sorted(answers) == sorted(steps.begun)
    assert 5 <= len(answers) <= 12
    assert not steps.aborted


def test_what_runs_is_aborted_where_nobody_wants_it_any_more() -> None:
    steps = Steps()
    answers = PlannedEngine(steps, pages=1000, context=64, most_running=6, page=4).run(some_items(60), lambda: False)
    first = next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert first.request_id not in steps.aborted
    assert not steps.running
    assert 0 < len(steps.aborted) < len(steps.begun) == 6
    assert set(steps.aborted) < set(steps.begun)


def test_an_engine_that_dies_ends_the_batch_and_one_without_embeddings_says_so() -> None:
    class Dead(Steps):
        async def generate(
            self, prompt_token_ids: Sequence[int], params: SamplingParams, *, request_id: str
        ) -> AsyncIterator[RequestOutput]:
            raise RuntimeError("illegal address")
            yield

    with pytest.raises(RuntimeError, match="illegal address"):
        list(PlannedEngine(Dead(), pages=9, context=64, most_running=6).run(some_items(9), lambda: False))
    with pytest.raises(TersorError, match="makes no embeddings"):
        list(PlannedEngine(Steps(), pages=9, context=64, most_running=6).run([Item("a", np.arange(3), None)], bool))
