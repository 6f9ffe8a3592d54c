"""A batch job that is killed, interrupted or out of space, and taken up again."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.batches import MIXED, Echo, go, read, write

from tersor.engine import batch_store
from tersor.engine.batch_file import Progress, Report, draining
from tersor.engine.batch_items import Item
from tersor.engine.outputs import Answer
from tersor.errors import InputError, OutputError, TersorError


def killed_once(folder: Path, at: int, draw: random.Random) -> bool:
    """Run the job in a child that is killed at its `at`-th call that touches a file; return whether it was."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    try:
        calls = 0

        def dies(real: Callable[..., Any], name: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == at:
                    if name == "write":
                        descriptor, data = arguments
                        real(descriptor, data[: draw.randrange(len(data) + 1)])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments)

            return call

        for name in ("open", "write", "fsync", "ftruncate", "replace", "close"):
            setattr(os, name, dies(getattr(os, name), name))
        batch_store.SYNC_LINES = 3
        go(folder, Echo(seed=draw.randrange(99)), resume=True)
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_a_job_killed_at_any_point_is_resumed_without_loss_or_duplicate(tmp_path: Path) -> None:
    whole, job = tmp_path / "whole", tmp_path / "job"
    for folder in (whole, job):
        folder.mkdir()
        write(folder / "in.jsonl", MIXED)
    go(whole)
    draw, kills, runs = random.Random(5), 0, 0
    while kills < 20:
        runs += 1
        if not killed_once(job, draw.randrange(1, draw.choice([6, 15, 60])), draw):
            for path in job.glob("out*"):  # it came to its end: begin again
                path.unlink()
            assert runs < 200
            continue
        kills += 1
        if (job / "out.jsonl").exists():
            written = (job / "out.jsonl").read_bytes()
            assert written.count(b"\n") <= 50
    go(job, resume=True)
    for name in ("out.jsonl", "out.errors.jsonl"):
        assert sorted((job / name).read_bytes().splitlines()) == sorted((whole / name).read_bytes().splitlines())
    assert go(job, Echo(after=lambda count: pytest.fail("nothing is left to run")), resume=True).progress.done == 50


def test_what_is_answered_is_not_run_again(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED)
    engine = Echo(many=1)

    def fail(count: int) -> None:
        if count == 30:
            raise TersorError("the GPU fell off the bus")

    with pytest.raises(TersorError, match="fell off"):
        go(tmp_path, Echo(many=1, after=fail))
    first = len(read(tmp_path / "out.jsonl")) + len(read(tmp_path / "out.errors.jsonl")) - 3
    seen: list[Progress] = []
    go(tmp_path, engine, resume=True, on_progress=seen.append)
    parts = sum(3 if "many" in a["custom_id"] else 1 for a in read(tmp_path / "out.jsonl"))
    assert engine.ran <= parts + 5 - first
    assert seen[0].before == first + 3
    assert (seen[-1].done, seen[-1].failed) == (50, 8)


def test_a_torn_last_line_is_cut_off_and_answered_again(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:10])
    go(tmp_path)
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    for torn in (whole[:-1], whole[:-40], whole + b'{"id": "x', whole + b"\0\0\0\n"):
        out.write_bytes(torn)
        go(tmp_path, resume=True)
        assert sorted(out.read_bytes().splitlines()) == sorted(whole.splitlines())
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[0] + b"{ torn\n" + b"".join(lines[1:]))
    with pytest.raises(InputError, match=r"out\.jsonl line 2 is not JSON"):
        go(tmp_path, resume=True)


def test_another_model_input_or_sampling_is_not_blended_in(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:3])
    go(tmp_path)
    for options, what in (
        ({"model": "other"}, 'model "letters", now "other"'),
        ({"identity": {"weights": "abd"}}, 'weights "abc", now "abd"'),
        ({"identity": {"weights": "abc", "dtype": "fp6"}}, 'dtype null, now "fp6"'),
        ({"defaults": {"temperature": 1}}, 'sampling {}, now {"temperature": 1}'),
        ({"identity": {}}, 'weights "abc", now null'),
    ):
        with pytest.raises(InputError, match=f"cannot be resumed: it was made with {what}"):
            go(tmp_path, resume=True, **options)
    write(tmp_path / "in.jsonl", MIXED[:4])
    with pytest.raises(InputError, match="it was made with input"):
        go(tmp_path, resume=True)
    with pytest.raises(InputError, match="add --resume to continue it, or remove it"):
        go(tmp_path)
    assert len(read(tmp_path / "out.jsonl")) == 3


def test_an_output_that_no_job_wrote_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:3])
    (tmp_path / "out.jsonl").write_text("mine\n")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"is there, but not out\.jsonl\.manifest\.json"):
            go(tmp_path, resume=resume)
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


def test_failed_requests_run_again_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED)
    go(tmp_path)
    engine = Echo()
    assert go(tmp_path, engine, resume=True).progress.failed == 8
    assert engine.ran == 0

    class Mended(Echo):
        def answer(self, item: Item) -> Answer:
            return super().answer(Item(item.key, item.tokens + 1, item.params))

    report = go(tmp_path, Mended(), resume=True, retry_failed=True)
    assert (report.progress.done, report.progress.failed) == (55, 3)
    assert [e["line"] for e in read(tmp_path / "out.errors.jsonl")] == [41, 42, 58]
    assert len({a["custom_id"] for a in read(tmp_path / "out.jsonl")}) == len(read(tmp_path / "out.jsonl")) == 55


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_what_runs_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    write(tmp_path / "in.jsonl", MIXED[:40])
    told: list[str] = []
    engine = Echo(after=lambda count: signal.raise_signal(number) if count == 10 else None)
    before = signal.getsignal(number)
    report = go(tmp_path, engine, on_stop=lambda: told.append("stop"))
    assert signal.getsignal(number) is before
    assert told == ["stop"]
    assert engine.ran == 13  # ten and the three that ran beside the tenth
    assert report.interrupted
    assert report.exit_status == 130
    assert report.message == "stopped: 13 of 40 answered; run again with --resume to go on"
    assert go(tmp_path, resume=True).message == f"40 of 40 answered in {tmp_path}/out.jsonl"


def test_a_second_interrupt_stops_at_once_and_keeps_what_is_answered(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:40])
    engine = Echo(after=lambda count: signal.raise_signal(signal.SIGINT) if count in (10, 11) else None)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, engine)
    assert len(read(tmp_path / "out.jsonl")) == 11
    assert go(tmp_path, resume=True).progress.done == 40


def test_a_thread_that_gets_no_signals_runs_a_job_all_the_same(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:5])
    reports: list[Report] = []
    thread = threading.Thread(target=lambda: reports.append(go(tmp_path)))
    thread.start()
    thread.join()
    assert reports[0].progress.done == 5
    with draining() as stopping:
        assert not stopping()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_with_one_line_and_the_job_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    write(tmp_path / "in.jsonl", MIXED)
    real, room = os.write, [3000]

    def short(descriptor: int, data: Any) -> int:
        if room[0] <= 0:
            raise OSError(code, os.strerror(code))
        written = real(descriptor, data[: room[0]])
        room[0] -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(batch_store.os, "write", short)
        with pytest.raises(OutputError, match=r"no space left while writing .*out\.jsonl .* with --resume") as info:
            go(tmp_path)
        assert "\n" not in str(info.value)
    assert len(read(tmp_path / "out.jsonl")) > 2
    assert go(tmp_path, resume=True).progress.done == 50
    assert len({a["custom_id"] for a in read(tmp_path / "out.jsonl")}) == len(read(tmp_path / "out.jsonl")) == 50


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:5])

    def again(count: int) -> None:
        with pytest.raises(InputError, match="another process is writing"):
            go(tmp_path, resume=True)

    assert go(tmp_path, Echo(after=again)).progress.done == 5


def test_an_engine_that_ends_early_or_answers_twice_loses_and_doubles_nothing(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:20])

    class Odd(Echo):
        def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
            for item in items[:7]:
                yield self.answer(item)
                yield self.answer(items[0])

    with pytest.raises(TersorError, match="ended with 13 requests not answered: run again with --resume"):
        go(tmp_path, Odd())
    assert len(read(tmp_path / "out.jsonl")) == 7
    assert go(tmp_path, resume=True).progress.done == 20
    assert len(read(tmp_path / "out.jsonl")) == 20


def test_a_job_whose_engine_cannot_be_made_leaves_nothing_and_begins_again_in_another_way(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:5])
    (tmp_path / "in.jsonl").open("a").write("{no request\n")

    class Unmade(Echo):
        def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
            raise InputError("max_length is 9: too much")

    for _ in range(2):
        with pytest.raises(InputError, match="max_length is 9"):
            go(tmp_path, Unmade())
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert go(tmp_path).progress.done == 5


def test_a_job_that_was_taken_up_keeps_its_answers_where_its_engine_cannot_be_made(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", MIXED[:8])

    class Ends(Echo):
        def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
            yield self.answer(items[0])
            raise TersorError("gone")

    class Unmade(Echo):
        def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
            raise TersorError("not made")

    with pytest.raises(TersorError, match="gone"):
        go(tmp_path, Ends())
    with pytest.raises(TersorError, match="not made"):
        go(tmp_path, Unmade(), resume=True)
    assert len(read(tmp_path / "out.jsonl")) == 1
    assert go(tmp_path, resume=True).progress.done == 8


@pytest.mark.parametrize("what", ["locked", "no plain file", "no space"])
def test_a_job_that_cannot_begin_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    write(tmp_path / "in.jsonl", MIXED)
    errors = tmp_path / "wrong.jsonl"
    if what == "locked":
        held = batch_store._Appender(errors)
    elif what == "no plain file":
        os.mkfifo(errors)
    else:

        def full(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(batch_store.files, "write_whole", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises((InputError, OutputError)):
        go(tmp_path, errors=errors)
    assert sorted(tmp_path.iterdir()) == before
    if what == "locked":
        held.close()
