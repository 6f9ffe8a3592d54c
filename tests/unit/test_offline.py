"""engine/offline.py: known prompts run by a plan, with the answers that they have without one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from helpers.fake_core import core, solo

from tersor.engine.batch_items import Item
from tersor.engine.core import Core
from tersor.engine.offline import OfflineEngine
from tersor.engine.outputs import Answer, EmbeddingRequestOutput, RequestOutput
from tersor.engine.params import SamplingParams


def some_items(count: int, **params: int) -> list[Item]:
    """Prompts of 10 prefixes of three pages, shuffled."""
    draw = random.Random(7)
    prefixes = [[draw.randrange(20, 400) for _ in range(12)] for _ in range(10)]
    items = [
        Item(
            str(i),
            np.array(prefixes[i % 10] + [20 + i] * (1 + i % 5), np.int32),
            SamplingParams(**{"max_tokens": 1 + i % 9} | params),
        )
        for i in range(count)
    ]
    draw.shuffle(items)
    return items


def audited(engine: Core, outputs: Iterator[Answer]) -> Iterator[Answer]:
    for output in outputs:
        engine.scheduler.audit()
        yield output


@pytest.mark.parametrize("pages", [12, 30, 200])
def test_planned_requests_draw_what_each_draws_alone_and_leave_nothing_behind(pages: int) -> None:
    engine, items = core(pages=pages), some_items(70)
    found = {output.request_id: output for output in audited(engine, OfflineEngine(engine).run(items, lambda: False))}
    assert found.keys() == {item.key for item in items}
    for item in items:
        assert item.params is not None and item.params.max_tokens is not None
        assert found[item.key].outputs[0].token_ids == solo(item.tokens.tolist(), item.params.max_tokens)
    assert not engine.unfinished and not engine.scheduler.cache.pinned
    engine.scheduler.audit()


@pytest.mark.parametrize("pages", [12, 16, 40])
def test_every_prefix_is_computed_once_however_few_pages_there_are(pages: int) -> None:
    engine, items = core(pages=pages, max_rows=4), some_items(80)
    offline = OfflineEngine(engine)
    assert len(list(offline.run(items, lambda: False))) == 80
    assert offline.plan is not None
    assert engine.scheduler.cached_tokens == offline.plan.saved == 70 * 12


def test_few_requests_wait_in_the_core() -> None:
    engine = core(pages=400, max_rows=8)
    most = 0
    for _ in OfflineEngine(engine).run(some_items(200), lambda: False):
        most = max(most, engine.scheduler.unfinished)
    assert 8 <= most <= 10


def test_continuations_count_as_rows_and_all_of_them_are_answered() -> None:
    engine, items = core(pages=60), some_items(30, n=3, max_tokens=4)
    for output in OfflineEngine(engine).run(items, lambda: False):
        item = next(item for item in items if item.key == output.request_id)
        assert [one.token_ids for one in output.outputs] == [solo(item.tokens.tolist(), 4, i) for i in range(3)]


def test_a_request_that_cannot_be_served_fails_alone() -> None:
    engine = core(pages=8)
    long = Item("long", np.arange(20, 59, dtype=np.int32), SamplingParams(max_tokens=4))
    found = {one.request_id: one for one in OfflineEngine(engine).run([*some_items(20), long], lambda: False)}
    assert len(found) == 21
    assert "need 11 pages of 4 tokens, and there are 7" in str(found["long"].error)
    assert all(one.error is None for name, one in found.items() if name != "long")
    assert not engine.scheduler.cache.pinned


def test_a_wish_to_stop_finishes_what_has_begun_and_begins_nothing() -> None:
    engine, items, found = core(pages=400), some_items(100, max_tokens=9), list[RequestOutput]()
    for output in OfflineEngine(engine).run(items, lambda: len(found) >= 5):
        found.append(output)
    assert 5 <= len(found) <= 5 + 8 + 8
    assert all(len(one.outputs[0].token_ids) == 9 for one in found)
    assert not engine.unfinished and not engine.scheduler.cache.pinned


def test_a_run_that_nobody_reads_to_its_end_leaves_the_core_empty() -> None:
    engine = core(pages=400)
    run = OfflineEngine(engine).run(some_items(100, max_tokens=9), lambda: False)
    next(run)
    run.close()
    assert not engine.unfinished and not engine.scheduler.cache.pinned
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize("pages", [12, 40])
def test_last_states_are_asked_for_among_texts_and_draw_nothing(pages: int) -> None:
    engine, items = core(pages=pages), some_items(60)
    items = [replace(item, params=None) if int(item.key) % 3 else item for item in items]
    long = Item("long", np.arange(20, 90, dtype=np.int32), None)
    answers = audited(engine, OfflineEngine(engine).run([*items, long], lambda: False))
    found = {output.request_id: output for output in answers}
    drawn = 0
    for item in items:
        output = found.pop(item.key)
        if item.params is None:
            assert isinstance(output, EmbeddingRequestOutput) and output.error is None
            state = np.array([item.tokens.sum(), item.tokens.size], np.float32)
            np.testing.assert_allclose(output.outputs.embedding, state / np.linalg.norm(state), rtol=1e-6)
        else:
            assert isinstance(output, RequestOutput) and item.params.max_tokens is not None
            assert output.outputs[0].token_ids == solo(item.tokens.tolist(), item.params.max_tokens)
            drawn += item.params.max_tokens
    assert engine.stats().generated_tokens == drawn
    assert isinstance(found["long"], EmbeddingRequestOutput) and found["long"].outputs.embedding.size == 0
    assert found["long"].error == "long: the prompt has 70 tokens, and the context is 60"
