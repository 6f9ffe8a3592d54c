"""Several workers answer one batch: whole groups, each request once, whatever workers are lost."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.batches import MIXED, Echo, MakeMortal, MakeNone, MakeSlow, go, read, write

from tersor.engine.batch_items import Item
from tersor.engine.dispatch import TRIES, Dispatch, Done, Event, Lost, run_over
from tersor.engine.groups import plan
from tersor.engine.outputs import EmbeddingRequestOutput
from tersor.engine.params import SamplingParams
from tersor.engine.processes import Processes
from tersor.errors import InputError, TersorError


def some_items(count: int = 60, members: int = 5) -> list[Item]:
    """Prompts of which some begin alike."""
    return [
        Item(str(i), np.array([1 + i // members] * 70 + [1 + i % members], np.int32), SamplingParams(max_tokens=3))
        for i in range(count)
    ]


class Pretended:
    """Workers of a simulation: each event is an answer, an end, or by chance a loss; some items end any worker."""

    def __init__(self, count: int, draw: random.Random, losses: float = 0.0, deadly: Sequence[str] = ()) -> None:
        self.count, self.draw, self.losses, self.deadly = count, draw, losses, set(deadly)
        self.pieces: list[tuple[int, list[str]]] = []
        self.queues: dict[int, list[Item]] = {}
        self.gone: set[int] = set()
        self.stopped = False

    def begin(self, worker: int, items: list[Item]) -> None:
        assert worker not in self.queues
        assert worker not in self.gone
        self.pieces.append((worker, [item.key for item in items]))
        self.queues[worker] = list(items)

    def wait(self, seconds: float) -> list[tuple[int, Event]]:
        worker = self.draw.choice(sorted(self.queues))
        queue = self.queues[worker]
        if self.draw.random() < self.losses or (queue and queue[0].key in self.deadly):
            del self.queues[worker]
            final = self.draw.random() < 0.1 and len(self.gone) < self.count - 1 and not self.deadly
            self.gone |= {worker} if final else set()
            return [(worker, Lost("bad luck", final))]
        if not queue or self.stopped:
            del self.queues[worker]
            return [(worker, Done())]
        return [(worker, Echo().answer(queue.pop(0)))]

    def stop(self) -> None:
        self.stopped = True


def test_each_request_is_answered_once_whatever_workers_are_lost() -> None:
    for seed in range(60):
        draw = random.Random(seed)
        items = some_items(draw.randrange(1, 80), draw.randrange(1, 20))
        workers = Pretended(draw.randrange(1, 6), draw, losses=draw.choice([0.0, 0.02, 0.1]))
        answers = [answer.request_id for answer in run_over(workers, items, lambda: False)]
        assert sorted(answers) == sorted(item.key for item in items)


def test_groups_stay_whole_and_shrink_towards_the_end() -> None:
    items = some_items(400, 5)
    workers = Pretended(4, random.Random(0))
    assert len(list(run_over(workers, items, lambda: False))) == 400
    for _, keys in workers.pieces:
        prefixes = [int(key) // 5 for key in keys]
        assert all(prefixes.count(prefix) == 5 for prefix in prefixes)
    sizes = [len(keys) for _, keys in workers.pieces]
    assert max(sizes[:4]) == max(sizes) >= 40
    assert min(sizes) <= 10
    assert len(sizes) < 40


def test_requests_of_a_piece_are_in_the_order_of_the_plan() -> None:
    items = some_items(100, 4)
    dispatch = Dispatch(plan([item.tokens for item in items]), 3)
    while dispatch.waiting:
        piece = dispatch.take(0)
        assert piece == sorted(piece)
        for position in piece:
            assert dispatch.answered(0, position)
            assert not dispatch.answered(0, position)


def test_a_request_that_ends_its_engine_fails_alone() -> None:
    items = [replace(item, params=None) if item.key == "40" else item for item in some_items(64, 4)]
    workers = Pretended(2, random.Random(1), deadly=["17", "40"])
    answers = {answer.request_id: answer for answer in run_over(workers, items, lambda: False)}
    assert len(answers) == 64 and isinstance(answers["40"], EmbeddingRequestOutput)
    failed = {key: answer.error for key, answer in answers.items() if answer.error}
    assert failed == dict.fromkeys(["17", "40"], f"its engine was lost {TRIES} times: bad luck")


def test_no_worker_left_is_an_error() -> None:
    class Doomed(Pretended):
        def wait(self, seconds: float) -> list[tuple[int, Event]]:
            worker, _ = self.queues.popitem()
            return [(worker, Lost("out of memory", final=True))]

    with pytest.raises(TersorError, match="no worker is left: out of memory"):
        list(run_over(Doomed(2, random.Random(0)), some_items(), lambda: False))


def test_a_wish_to_stop_hands_out_no_more() -> None:
    workers, answers = Pretended(2, random.Random(0)), list[str]()
    for answer in run_over(workers, some_items(), lambda: len(answers) >= 10):
        answers.append(answer.request_id)
    assert workers.stopped
    assert len(answers) == 10
    assert len(workers.pieces) == 2


def test_processes_answer_a_batch_also_where_one_is_killed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "in.jsonl", MIXED)
    go(tmp_path / "one")
    with Processes(MakeMortal(tmp_path / "mark"), 2) as engines:
        report = go(tmp_path / "two", engines)
    assert (tmp_path / "mark").exists()
    assert (report.progress.done, report.progress.failed) == (50, 8)
    one, two = (sorted((tmp_path / name / "out.jsonl").read_bytes().splitlines()) for name in ("one", "two"))
    assert one == two


def test_processes_drain_when_told_to_stop(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:40])
    with Processes(MakeSlow(), 2) as engines:
        report = go(
            tmp_path,
            engines,
            on_progress=lambda now: signal.raise_signal(signal.SIGINT) if now.done == 5 else None,
        )
    assert report.interrupted
    assert 5 <= len(read(tmp_path / "out.jsonl")) < 30
    assert go(tmp_path, resume=True).progress.done == 40


def test_a_run_that_was_not_read_to_its_end_answers_no_other() -> None:
    items = [Item(f"{i}", np.array([5, 6, i], np.int32), SamplingParams(max_tokens=3)) for i in range(40)]
    with Processes(MakeSlow(), 1) as engines:
        assert len(list(engines.run(items[:4], lambda: False))) == 4
        assert len(list(engines.run(items[:4], lambda: False))) == 4
        run = engines.run(items, lambda: False)
        next(iter(run))
        run.close()  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=r"^an earlier run of these engines was not read to its end: make others$"):
            engines.run([replace(item, tokens=item.tokens + 1) for item in items], lambda: False)


def test_an_engine_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:3])
    with (
        Processes(MakeNone(), 1) as engines,
        pytest.raises(TersorError, match="engine of worker 0 cannot be made: no GPU for worker 0"),
    ):
        go(tmp_path, engines)
    with pytest.raises(InputError, match="processes of a batch are 0"):
        Processes(MakeNone(), 0)
