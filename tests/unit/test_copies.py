"""Copies of a model in processes: answers are those of one, and one that is lost takes nobody with it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import counting
from helpers.counting import LAST, Load

from tersor.engine import copies as room
from tersor.engine.copies import Copies
from tersor.engine.one_copy import Checked, Failed
from tersor.engine.outputs import ABORT, LENGTH, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.stats import ANSWERS, LOST, STARTS, EngineStats
from tersor.errors import InputError, LostError, TersorError


@pytest.fixture(scope="module")
def running() -> Iterator[Copies]:
    with counting.copies() as found:
        yield found
    assert not multiprocessing.active_children()


@pytest.fixture
def own() -> Iterator[None]:
    """No process that a test starts is there when it has ended."""
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


@pytest.fixture
def two(running: Copies) -> Iterator[Copies]:
    """Two copies for the module; each test leaves nothing in them."""
    yield running
    assert soon(lambda: idle(running)) and [one.load for one in running.copies()] == [0, 0]


def soon(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def idle(one: Copies) -> bool:
    stats = one.stats()
    return stats.running + stats.waiting + stats.pages_used == 0


async def all_of(one: Copies, name: str, prompt: list[int], count: int, **more: Any) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=count)
    return [output async for output in one.generate(prompt, params, request_id=name, **more)]


async def begun(one: Copies, name: str, prompt: list[int]) -> asyncio.Task[list[RequestOutput]]:
    """Ask for an answer without an end, and return when it grows."""
    before = one.stats().generated_tokens
    task = asyncio.create_task(all_of(one, name, prompt, LAST))
    async with asyncio.timeout(20):
        while one.stats().generated_tokens <= before:
            await asyncio.sleep(0.002)
    return task


def prompts(one: Copies) -> list[int]:
    return [copy.engine.prompt_tokens for copy in one.copies()]


def child(one: Copies, number: int) -> int:
    """The process of a copy."""
    found = one._children._children[number].pid
    assert found is not None
    return found


def test_hundreds_of_requests_are_answered_as_each_is_alone_by_both(two: Copies) -> None:
    async def main() -> None:
        draw = random.Random(0)
        sizes = [(draw.randint(1, 20), draw.randint(1, 20)) for _ in range(300)]
        asked = (all_of(two, f"r{i}", [i % 250] * length, count) for i, (length, count) in enumerate(sizes))
        for (length, count), outputs in zip(sizes, await asyncio.gather(*asked), strict=True):
            last = outputs[-1].outputs[0]
            assert last.token_ids == list(range(length, length + count)) and last.finish_reason == LENGTH
            seen = [len(output.outputs[0].token_ids) for output in outputs]
            assert seen == sorted(set(seen)) and seen[-1] == count

    before = prompts(two)
    asyncio.run(main())
    grown = [after - own for after, own in zip(prompts(two), before, strict=True)]
    assert min(grown) > sum(grown) / 4


def test_a_conversation_stays_where_it_began_and_others_go_where_less_is_to_do(two: Copies) -> None:
    async def main() -> None:
        text = [1000] * 40
        for turn in range(4):
            (*_, last) = await all_of(two, f"t{turn}", text, 8)
            assert last.num_cached_tokens == (0 if not turn else (len(text) - 5) // 4 * 4)
            text = [*text, *last.outputs[0].token_ids, 9, 9, 9, 9]
            before = prompts(two)
            await all_of(two, f"o{turn}", [2000 + turn] * 20, 1)
            assert sum(after != own for after, own in zip(prompts(two), before, strict=True)) == 1
        (*_, other) = await all_of(two, "salt", text, 1, salt="a")
        assert other.num_cached_tokens == 0

    asyncio.run(main())


def test_a_long_answer_sends_the_next_request_to_the_other_copy(two: Copies) -> None:
    async def main() -> None:
        busy = await begun(two, "long", [1])
        mine = [copy.requests for copy in two.copies()].index(1)
        assert two.copies()[mine].load > 0
        for number in range(3):
            before = prompts(two)
            await all_of(two, f"s{number}", [3000 + number] * 9, 1)
            assert prompts(two)[mine] == before[mine]
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)

    asyncio.run(main())


def test_a_reader_that_leaves_and_an_abort_free_pages_in_the_copy(two: Copies) -> None:
    async def main() -> None:
        async for _ in two.generate([1], SamplingParams(max_tokens=LAST), request_id="a"):
            break
        reasons = []
        async for output in two.generate([1], SamplingParams(max_tokens=LAST), request_id="b"):
            reasons.append(output.outputs[0].finish_reason)
            await two.abort("b")
            await two.abort("nobody")
        assert reasons[-1] == ABORT and set(reasons[:-1]) <= {None}

    asyncio.run(main())
    assert soon(lambda: idle(two))


def test_one_that_cannot_be_served_is_refused_and_others_go_on(two: Copies) -> None:
    async def main() -> None:
        waiting = asyncio.create_task(all_of(two, "a", [1], 500))
        await asyncio.sleep(0)
        with pytest.raises(InputError, match="context is 100000"):
            await all_of(two, "b", [1] * 100_000, 9)
        with pytest.raises(InputError, match="'a' is open already"):
            await all_of(two, "a", [1], 1)
        assert (await waiting)[-1].finished

    asyncio.run(main())


def test_a_grammar_is_compiled_by_the_copies_or_refused(two: Copies) -> None:
    with pytest.raises(TersorError, match="a grammar need a tokenizer"):  # these copies have none
        two.check_grammar({"regex": "a"})


def test_a_copy_that_is_killed_ends_its_requests_alone_and_the_last_one_ends_the_engine(own: None) -> None:
    said: list[str] = []

    async def main(one: Copies) -> None:
        first, second = await begun(one, "a", [1]), await begun(one, "b", [2])
        assert [copy.requests for copy in one.copies()] == [1, 1]
        os.kill(child(one, 0), signal.SIGKILL)
        with pytest.raises(LostError, match=r"^copy 0 of 2 ended by SIGKILL$"):
            await first
        assert one.healthy and [copy.state for copy in one.copies()] == [LOST, ANSWERS]
        for number in range(4):
            assert (await all_of(one, f"c{number}", [3], 5))[-1].finished
        assert not second.done()
        os.kill(child(one, 1), signal.SIGKILL)
        with pytest.raises(LostError, match=r"^copy 1 of 2 ended by SIGKILL$"):
            await second
        assert not one.healthy and idle(one) and one.stats().generated_tokens > 20
        with pytest.raises(LostError, match="all copies of the model have ended"):
            await all_of(one, "d", [3], 5)

    with counting.copies(said, seconds=0.002) as one:
        asyncio.run(main(one))
    assert said == [
        "copy 0 of 2 ended by SIGKILL; it had 1 request, and is not started again, 1 are left",
        "copy 1 of 2 ended by SIGKILL; it had 1 request, and is not started again, 0 are left",
    ]


def test_a_copy_whose_step_fails_is_started_again_and_counts_go_on(own: None) -> None:
    said: list[str] = []

    async def main(one: Copies) -> None:
        waiting = await begun(one, "a", [1])
        (*_, last) = await all_of(one, "b", [2] * 8, 5)
        before = one.stats()
        with pytest.raises(LostError, match=r"^copy 1 of 2 ended: the device is gone$"):
            await all_of(one, "c", [3] * 50, 5)
        assert not waiting.done() and last.finished
        assert {copy.state for copy in one.copies()} == {ANSWERS, STARTS} and one.healthy
        assert soon(lambda: said[-1:] == ["copy 1 of 2 answers again"])
        (*_, again) = await all_of(one, "d", [2] * 8, 5)
        assert again.num_cached_tokens == 0  # nothing is left of what it had
        after = one.stats()
        assert after.prompt_tokens >= before.prompt_tokens + 8 and after.generated_tokens >= before.generated_tokens + 5
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    with counting.copies(said, restarts=1, failing=50, seconds=0.001) as one:
        asyncio.run(main(one))
    assert said[0] == "copy 1 of 2 ended: the device is gone; it had 1 request, and is started again"


def test_a_copy_that_hangs_keeps_nobody_else_and_is_ended(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_GRACE", 0.2)

    async def main(one: Copies) -> None:
        os.kill(child(one, 0), signal.SIGSTOP)
        hung = asyncio.create_task(all_of(one, "a", [1] * 90_000, 5))  # more than a pipe holds
        await asyncio.sleep(0.05)
        for number in range(5):
            assert (await all_of(one, f"b{number}", [2], 5))[-1].finished
        await one.close()
        with pytest.raises(TersorError, match="the engine is closed"):
            await hung
        with pytest.raises(TersorError, match="the engine is closed"):
            await all_of(one, "c", [1], 1)

    with counting.copies() as one:
        asyncio.run(main(one))
        one.end()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("usage", InputError, r"^there is no such model$"),
        ("failure", LostError, r"^copy 1 of 2 ended: it does not launch$"),
    ],
)
def test_a_copy_that_cannot_be_loaded_ends_all_at_once(
    own: None, how: str, error: type[Exception], message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=message):
        Copies(Load(broken=1, how=how, late=60), 2, lambda: None)  # type: ignore[arg-type, return-value]
    assert time.monotonic() - started < 30


def test_a_grammar_that_is_compiled_after_its_copy_has_failed_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked has been let go when a copy said that it ends; its compilers may still say that they are done."""
    words = iter([Failed("the device is gone"), Checked(3, None)])

    def recv() -> object:
        word = next(words, None)
        if word is None:
            raise EOFError
        return word

    lost: list[object] = []
    of_nobody = Copies.__new__(Copies)
    monkeypatch.setattr(of_nobody, "_lost", lost.append, raising=False)
    link: Any = SimpleNamespace(recv=recv)
    copy = room._Copy(0, link, EngineStats())
    of_nobody._read(copy)
    assert lost == [copy] and copy.state == LOST
