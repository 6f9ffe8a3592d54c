"""engine/threaded.py: many coroutines ask one engine in its thread."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from helpers import counting, tiny_lm

from tersor.engine.outputs import ABORT, LENGTH, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.protocol import ModelInfo
from tersor.engine.threaded import ThreadedEngine
from tersor.errors import InputError, TersorError

TOKENIZER = tiny_lm.tokenizer()


def engine(failing: int = 1 << 30, pages: int = 30_000) -> ThreadedEngine:
    return ThreadedEngine(counting.core(TOKENIZER, failing, pages), ModelInfo("counting", 100_000, 300, TOKENIZER))


async def all_of(one: ThreadedEngine, name: str, length: int, count: int) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=count)
    return [output async for output in one.generate([1] * length, params, request_id=name)]


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def test_a_thousand_requests_are_answered_as_each_is_alone() -> None:
    async def main() -> None:
        one = engine()
        random.seed(0)
        sizes = [(random.randint(1, 20), random.randint(1, 20)) for _ in range(1000)]
        found = await asyncio.gather(*(all_of(one, f"r{i}", *size) for i, size in enumerate(sizes)))
        for (length, count), outputs in zip(sizes, found, strict=True):
            last = outputs[-1].outputs[0]
            assert last.token_ids == list(range(length, length + count)) and last.finish_reason == LENGTH
            seen = [len(output.outputs[0].token_ids) for output in outputs]
            assert seen == sorted(set(seen)) and seen[-1] == count
        stats = one.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        await one.close()

    run(main())


def test_a_reader_that_leaves_frees_its_pages() -> None:
    async def main() -> None:
        one = engine()
        async for _ in one.generate([1], SamplingParams(max_tokens=90_000), request_id="a"):
            break
        other = one.generate([2], SamplingParams(max_tokens=90_000), request_id="b")
        await anext(other)
        await other.aclose()
        async with asyncio.timeout(10):
            while one.stats().pages_used:
                await asyncio.sleep(0.001)
        assert one.stats().generated_tokens < 180_000
        await one.close()

    run(main())


def test_abort_ends_a_request_and_is_no_error_twice() -> None:
    async def main() -> None:
        one = engine()
        reasons = []
        async for output in one.generate([1], SamplingParams(max_tokens=90_000), request_id="a"):
            reasons.append(output.outputs[0].finish_reason)
            await one.abort("a")
            await one.abort("nobody")
        assert reasons[-1] == ABORT and set(reasons[:-1]) <= {None}
        await one.close()

    run(main())


def test_one_that_cannot_be_served_is_refused_and_others_go_on() -> None:
    async def main() -> None:
        one = engine(pages=10)
        waiting = asyncio.create_task(all_of(one, "a", 3, 9))
        await asyncio.sleep(0)
        with pytest.raises(InputError, match="need 25 pages"):
            await all_of(one, "b", 90, 9)
        with pytest.raises(InputError, match="'a' is open already"):
            await all_of(one, "a", 1, 1)
        assert (await waiting)[-1].finished
        await one.close()

    run(main())


def test_a_step_that_fails_is_told_to_all_and_to_those_who_come_later() -> None:
    async def main() -> None:
        one = engine(failing=7)
        assert one.healthy
        waiting = asyncio.create_task(all_of(one, "a", 3, 90_000))
        await asyncio.sleep(0)
        for ask in (all_of(one, "b", 7, 5), waiting, all_of(one, "c", 1, 1)):
            with pytest.raises(TersorError, match="the engine has failed: the device is gone"):
                await ask
        assert not one.healthy
        await one.close()

    run(main())


def test_a_request_that_comes_as_the_engine_fails_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        one = engine(failing=7)
        opened = one._boxes.open

        def late(name: str) -> Any:
            """Open a box when whoever had one has been told."""
            one._steps.add("other", [1] * 9, SamplingParams(max_tokens=1))
            one._thread.join()
            return opened(name)

        monkeypatch.setattr(one._boxes, "open", late)
        async with asyncio.timeout(10):
            with pytest.raises(TersorError, match="the engine has failed: the device is gone"):
                await all_of(one, "a", 1, 5)
        assert not list(one._boxes)
        await one.close()

    run(main())


def test_a_closed_engine_ends_what_is_open() -> None:
    async def main() -> None:
        one = engine()
        waiting = asyncio.create_task(all_of(one, "a", 3, 90_000))
        await asyncio.sleep(0)
        await one.close()
        await one.close()
        with pytest.raises(TersorError, match="the engine is closed"):
            await waiting
        with pytest.raises(TersorError, match="the engine is closed"):
            await all_of(one, "b", 3, 1)

    run(main())
