"""`tersor batch` on the bundled model: answers, failures, and jobs that end early and go on."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.batches import read, write
from helpers.tiny_lm import TINY
from helpers.usage import refused_in_one_line

import tersor
from tersor.cli import batch as verb
from tersor.cli.main import run
from tersor.engine.batch_file import Progress
from tersor.engine.config import EngineConfig
from tersor.errors import InputError, TersorError
from tersor.server import batch as server_batch
from tersor.server import engines as server_engines


def ask(number: int, **body: Any) -> dict[str, Any]:
    """A line; of three, one is sampled and two are greedy."""
    given = {"prompt": f"The rule of number {number % 25} is", "max_tokens": 2 + number % 4}
    given |= {} if number % 3 == 0 else {"temperature": 0}
    given |= body
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": given}


LINES = [ask(i) for i in range(60)]


def words(folder: Path, *more: str) -> list[str]:
    paths = ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
    return ["batch", "-m", str(TINY), *paths, "--device", "cpu", "--max-length", "256", "--max-rows", "8", *more]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The verb chooses a number of threads for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def answered(folder: Path) -> dict[str, bytes]:
    """custom_id -> its line, each answered once."""
    lines = (folder / "out.jsonl").read_bytes().splitlines(keepends=True)
    found = {json.loads(line)["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def test_answers_are_those_of_the_model_and_bad_lines_stop_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [*LINES[:10], "broken", ask(3), ask(11, stream=True), ask(12, n=200), ask(13, prompt="a " * 400)]
    write(tmp_path / "in.jsonl", lines)
    assert run(words(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("10 of 15 answered in ") and "5 failed (see " in shown
    assert run(words(tmp_path, "--resume", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["total"], told["answered"], told["failed"], told["interrupted"]) == (15, 10, 5, False)
    assert told["output"] == str(tmp_path / "out.jsonl")
    found = {name: json.loads(line)["response"]["body"] for name, line in answered(tmp_path).items()}
    model = tersor.LLM(TINY, device="cpu", kv_bytes=1 << 22)
    for line in LINES[:10]:
        body = line["body"]
        if "temperature" not in body:
            continue
        greedy = tersor.SamplingParams(max_tokens=body["max_tokens"], temperature=0)
        (output,) = model.generate(body["prompt"], greedy)
        assert found[line["custom_id"]]["choices"][0]["text"] == output.outputs[0].text
    codes = {entry["line"]: entry["error"] for entry in read(tmp_path / "out.errors.jsonl")}
    assert {number: error["code"] for number, error in codes.items()} == {
        11: "invalid_json",
        12: "duplicate_custom_id",
        13: "invalid_request",
        14: "invalid_request",
        15: "context_length_exceeded",
    }
    assert "less than or equal to 128" in codes[14]["message"]


def test_chats_are_read_by_the_template_as_the_server_reads_them(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": "Say <|endoftext|>"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "f"}}]},
    ]
    url = "/v1/chat/completions"
    write(
        tmp_path / "in.jsonl",
        [
            {"custom_id": f"c{i}", "method": "POST", "url": url, "body": {**chat, "max_tokens": 3, "temperature": 0}}
            for i, chat in enumerate(chats)
        ],
    )
    model = tmp_path / "model"
    model.mkdir()
    for file in TINY.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = (
        "{% if tools %}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert run([*words(tmp_path), "-m", str(model)]) == 0
    found = {name: json.loads(line)["response"]["body"] for name, line in answered(tmp_path).items()}
    assert found.keys() == {"c0", "c1"}
    asked = tersor.LLM(model, device="cpu", kv_bytes=1 << 22)
    (same,) = asked.generate("user: ab\nassistant:", tersor.SamplingParams(max_tokens=3, temperature=0))
    assert found["c1"]["choices"][0]["message"]["content"] == same.outputs[0].text
    assert found["c1"]["usage"]["prompt_tokens"] == len(same.prompt_token_ids)
    reasons = [entry["error"]["message"] for entry in read(tmp_path / "out.errors.jsonl")]
    assert len(reasons) == 2 and "'system'" in reasons[0] and "--tool-parser" in reasons[1]


def test_usage_that_cannot_be_meant_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(given: list[str], message: str) -> None:
        refused_in_one_line(given, 2, message, monkeypatch, capsys)

    (tmp_path / "in.jsonl").write_text("")
    refused(words(tmp_path), "in.jsonl is empty: a batch has a request in every line")
    write(tmp_path / "in.jsonl", LINES[:2])
    refused(words(tmp_path, "--retry-failed"), "--retry-failed is given without --resume")
    refused(words(tmp_path, "--tool-parser", "hermse"), "did you mean 'hermes'")
    both = ["--pipeline-parallel", "2", "--expert-parallel", "2", "--ray", "local"]
    refused(words(tmp_path, *both), "pipeline_parallel is 2 and expert_parallel is 2, 4 ranks, and engines are actors")
    copies = tmp_path / "copies.json"
    copies.write_text(json.dumps({"data": 2, "stages": [{"layers": [0, 4]}]}))
    both = ["--placement", str(copies), "--data-parallel", "3"]
    refused(words(tmp_path, *both), "--data-parallel is 3, and the placement is of 2 copies")
    refused(words(tmp_path, "--placement", str(tmp_path / "none")), "cannot be read as JSON")
    refused([*words(tmp_path), "-o", str(tmp_path / "in.jsonl")], "that is the input, too")
    assert run(words(tmp_path)) == 0
    capsys.readouterr()
    refused(words(tmp_path), "--resume")
    refused(words(tmp_path, "--resume", "--temperature", "1"), "sampling {}, now")
    assert run(words(tmp_path, "--resume")) == 0


def test_rates_say_how_long_the_rest_takes() -> None:
    shown = verb.rates(Progress(total=110, done=19, failed=1, before=10, seconds=5.0, drawn=100))
    assert shown == "2.0 requests/s, 20 tokens/s, 0:00:45 left, 1 failed"
    assert verb.rates(Progress(total=9, done=0, failed=0, before=0, seconds=0.0, drawn=0)).startswith(
        "0.0 requests/s, 0"
    )


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is loaded once, and never closed: what is forked from here has it."""
    torch.set_num_threads(1)
    model = tersor.LLM(TINY, device="cpu", max_length=256, max_rows=8, kv_bytes=1 << 22)
    monkeypatch.setattr(model, "close", lambda: None)
    monkeypatch.setattr(server_engines, "LLM", lambda *given, **options: model)
    monkeypatch.setattr(server_batch, "load_tokenizer", lambda *given, **options: model.tokenizer)


def ended(folder: Path, number: int, when: Callable[[], bool]) -> int:
    """Run the job in a fork that gets a signal when it is time; return its exit status, negative of a signal."""
    child = os.fork()
    if not child:
        try:
            shown = os.open(folder / "shown.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(shown, 1)
            os.dup2(shown, 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            os._exit(run(words(folder, "--resume")))
        except BaseException:
            os._exit(99)
    done = (0, 0)
    while not when() and not (done := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.002)
    if not done[0]:
        os.kill(child, number)
        done = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(done[1])


def _is_time(out: Path, until: float, enough: int) -> bool:
    return time.monotonic() > until and (out.stat().st_size if out.exists() else 0) >= enough


def test_a_job_killed_at_any_time_is_resumed_byte_for_byte(tmp_path: Path, loaded: None) -> None:
    whole, job = tmp_path / "whole", tmp_path / "job"
    for folder in (whole, job):
        folder.mkdir()
        write(folder / "in.jsonl", [*LINES, "broken"])
    assert run(words(whole)) == 0
    size = (whole / "out.jsonl").stat().st_size
    out, draw, kills, partly = job / "out.jsonl", random.Random(2), 0, 0
    manifest = out.with_name("out.jsonl.manifest.json")
    while kills < 20:
        until, enough = time.monotonic() + draw.uniform(0, 0.1), draw.randrange(size) if kills % 3 else 0
        status = ended(job, signal.SIGKILL, partial(_is_time, out, until, enough))
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        partly += 0 < (out.stat().st_size if out.exists() else 0) < size
        if status and kills % 5:
            continue
        assert run(words(job, "--resume")) == 0
        ours, theirs = (json.loads((folder / manifest.name).read_text())["created"] for folder in (job, whole))
        same = {name: line.replace(b"%d" % ours, b"%d" % theirs) for name, line in answered(job).items()}
        assert same == answered(whole)
        assert (job / "out.errors.jsonl").read_bytes() == (whole / "out.errors.jsonl").read_bytes()
        for path in job.glob("out*"):
            path.unlink()
    assert partly > 5


def test_an_interrupt_finishes_what_runs_and_a_resume_goes_on(tmp_path: Path, loaded: None) -> None:
    write(tmp_path / "in.jsonl", [ask(i, max_tokens=20) for i in range(100)])
    out = tmp_path / "out.jsonl"
    assert ended(tmp_path, signal.SIGINT, lambda: out.exists() and out.stat().st_size > 0) == 130
    done = len(answered(tmp_path))
    assert 0 < done < 100
    said = (tmp_path / "shown.txt").read_text()
    assert f"stopped: {done} of 100 answered; run again with --resume to go on" in said
    assert run(words(tmp_path, "--resume")) == 0
    assert len(answered(tmp_path)) == 100


def test_the_command_itself_can_be_killed(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [ask(i, max_tokens=20) for i in range(100)])
    command = [sys.executable, "-m", "tersor", *words(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(tersor.__file__).parents[1])}
    job = subprocess.Popen(command, env=environment)
    out = tmp_path / "out.jsonl"
    while not (out.exists() and out.stat().st_size):
        assert job.poll() is None
        time.sleep(0.01)
    job.kill()
    job.wait()
    before = set(out.read_bytes().splitlines(keepends=True)[:-1])
    assert len(before) < 100
    assert run(words(tmp_path, "--resume")) == 0
    assert before <= set(answered(tmp_path).values()) and len(answered(tmp_path)) == 100


@pytest.mark.parametrize("stages", [1, 2])
def test_engines_in_processes_and_ranks_answer_the_same(tmp_path: Path, stages: int) -> None:
    spans = [[0, 4]] if stages == 1 else [[0, 3], [3, 4]]
    placed = tmp_path / "placement.json"
    placed.write_text(json.dumps({"data": 2, "stages": [{"layers": span} for span in spans]}))
    states = {**ask(100), "url": "/v1/embeddings", "body": {"input": ["The rule", "A rule"]}}
    write(tmp_path / "in.jsonl", [*LINES[:24], states])
    assert run(words(tmp_path, "--placement", str(placed))) == 0
    assert not multiprocessing.active_children()
    two = {name: json.loads(line)["response"]["body"] for name, line in answered(tmp_path).items()}
    for path in tmp_path.glob("out*"):
        path.unlink()
    assert run(words(tmp_path)) == 0
    one = {name: json.loads(line)["response"]["body"] for name, line in answered(tmp_path).items()}
    found, wanted = ([state["embedding"] for state in each.pop("r100")["data"]] for each in (one, two))
    assert {name: body["choices"] for name, body in one.items()} == {name: two[name]["choices"] for name in two}
    assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "stages", "message"),
    [
        ("cuda:1", 1, "device is cuda:1: 3 engines take a device each, say cuda"),
        ("auto", 1, "3 engines want a GPU each, and this machine has 2"),
        ("auto", 2, "3 engines want 2 GPUs each, and this machine has 2"),
    ],
)
def test_engines_that_have_no_device_each_are_refused(
    device: str, stages: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_engines, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = server_batch.BatchOptions(data_parallel=3)
    with ExitStack() as stack, pytest.raises(InputError, match=message):
        config = EngineConfig(device=device, pipeline_parallel=stages)
        server_batch.engine_of(str(TINY), None, config, options, stack)


def test_an_engine_that_fails_leaves_a_job_that_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tersor.engine.core import Core

    write(tmp_path / "in.jsonl", LINES)
    steps, real = [], Core.step

    def dies(self: Core, **options: Any) -> Any:
        steps.append(1)
        if len(steps) == 12:
            raise TersorError("the GPU fell off the bus")
        return real(self, **options)

    monkeypatch.setattr(Core, "step", dies)
    assert run(words(tmp_path)) == 1
    assert "fell off the bus" in capsys.readouterr().err
    assert 0 < len(answered(tmp_path)) < 60
    assert run(words(tmp_path, "--resume")) == 0
    assert len(answered(tmp_path)) == 60
