"""`tersor serve`: the bundled model behind HTTP, by the engine that serves GPUs too."""

from __future__ import annotations

import importlib.util
import multiprocessing
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers import tiny_lm
from helpers.tiny_lm import TINY
from helpers.usage import refused_in_one_line

from tersor.cli.main import run
from tersor.engine.config import EngineConfig
from tersor.engine.copies import Copies
from tersor.engine.protocol import AsyncEngine
from tersor.errors import InputError
from tersor.server import engines, serving
from tersor.server.options import ServerOptions

WORDS = ["serve", str(TINY), "--device", "cpu", "--port", "0"]


@dataclass
class Begun:
    """A server that a verb began, and what it was begun with."""

    engine: AsyncEngine
    options: ServerOptions
    url: str


@contextmanager
def begun(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Begun]:
    """Run the verb in a thread while the block runs; it must end well."""
    ready: Future[Begun] = Future()
    servers: list[Any] = []

    def serve(engine: AsyncEngine, options: ServerOptions, place: socket.socket) -> None:
        servers.append(serving.server_of(engine, options))
        place.listen()
        ready.set_result(Begun(engine, options, f"http://127.0.0.1:{place.getsockname()[1]}"))
        servers[0].run(sockets=[place])

    monkeypatch.setattr(serving, "serve", serve)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1) as pool:
        status = pool.submit(run, words)
        try:
            while not ready.done():
                assert not status.done(), "the verb ended early"
                status.exception(0.05) if status.done() else ready.exception(60)
            yield ready.result()
        finally:
            for server in servers:
                server.should_exit = True
            assert status.result(30) == 0
            torch.set_num_threads(threads)


def test_the_bundled_model_answers_as_transformers_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_lm.tokenizer()
    prompt = tokenizer("The first rule of", return_tensors="pt")
    wanted = tiny_lm.model().generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    body = {"prompt": "The first rule of", "max_tokens": 12, "temperature": 0, "logprobs": 0}
    capsys.readouterr()
    with begun(WORDS, monkeypatch) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answers = [client.post("/v1/completions", json=body).json() for _ in range(2)]
            assert client.get("/v1/models").json()["data"][0]["id"] == "tiny-lm"
            assert client.get("/stats").json()["pages_used"] == 0
        said = f"tiny-lm answers at {server.url}, context 2048 tokens\n"
    assert [one["choices"][0]["text"] for one in answers] == [tokenizer.decode(wanted)] * 2
    assert len(answers[0]["choices"][0]["logprobs"]["tokens"]) == 12
    assert capsys.readouterr().err == said
    assert not server.engine.healthy  # it was closed


def test_options_reach_server_and_engine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--host", "0.0.0.0", "--max-length", "100", "--name", "small", "--max-queue", "7", "--drain-seconds", "3"]
    more += ["--kv-bytes", "4000000", "--no-prefix-caching"]
    with begun([*WORDS, *more, "--tool-parser", "hermes", "--reasoning-parser", "think"], monkeypatch) as server:
        assert server.engine.info.context == 100
        assert 0 < server.engine.stats().pages_free < 30
        chosen = server.options
    assert (chosen.name, chosen.max_queue, chosen.drain_seconds) == ("small", 7, 3)
    assert (chosen.tool_parser, chosen.reasoning_parser) == ("hermes", "think")
    assert "small answers at http://0.0.0.0:" in (err := capsys.readouterr().err)
    assert "whoever reaches 0.0.0.0 may ask" in err


def test_ranks_answer_together_and_end_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": "The first rule of", "max_tokens": 12, "temperature": 0}
    texts = []
    for more in ([], ["--tensor-parallel", "2"]):
        with begun([*WORDS, *more], monkeypatch) as server:
            assert len(multiprocessing.active_children()) == len(more) // 2
            texts.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"])
        assert not multiprocessing.active_children()
    assert texts[0] == texts[1]


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}


def asked(url: str) -> tuple[list[Any], list[float]]:
    """What is answered to greedy prompts, at once, and the state of another."""
    prompts = [f"The rule of number {number} is" for number in range(8)]
    body = {"max_tokens": 12, "temperature": 0, "logprobs": 1}
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(8) as pool:

        def ask(prompt: str) -> Any:
            found = client.post("/v1/completions", json={**body, "prompt": prompt}).json()
            return found["choices"][0]["text"], found["choices"][0]["logprobs"]["tokens"], found["usage"]

        state = client.post("/v1/embeddings", json={"input": "The rule"}).json()["data"][0]["embedding"]
        return list(pool.map(ask, prompts)), state


def test_copies_answer_as_one_model_does_and_one_that_is_killed_takes_nobody_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with begun(WORDS, monkeypatch) as server:
        texts, state = asked(server.url)
    wanted = (texts, pytest.approx(state, abs=1e-5))
    capsys.readouterr()
    with begun([*WORDS, "--data-parallel", "2"], monkeypatch) as server:
        assert len(multiprocessing.active_children()) == 2
        assert asked(server.url) == wanted
        assert all(copy.engine.prompt_tokens > 20 for copy in server.engine.copies())
        with httpx.Client(base_url=server.url, timeout=60) as client:
            if importlib.util.find_spec("xgrammar") is not None:
                held = {"prompt": "Give", "max_tokens": 30, "temperature": 0}
                for schema, status in ((SCHEMA, 200), ({"type": "nothing"}, 400)):
                    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
                    found = client.post("/v1/completions", json={**held, "response_format": form})
                    assert found.status_code == status
            body = {"prompt": "The", "max_tokens": 1500, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = (line for line in response.iter_lines() if line)
                next(lines)
                place = [copy.requests for copy in server.engine.copies()].index(1)
                assert isinstance(server.engine, Copies)
                server.engine._children._children[place].kill()  # type: ignore[attr-defined]
                *_, error, done = lines
            assert f"copy {place} of 2 ended by SIGKILL" in error and done == "data: [DONE]"
            assert client.get("/health").json()["status"] in ("ok", "degraded")
            assert 'tersor_copy_healthy{copy="' in client.get("/metrics").text
        assert asked(server.url) == wanted
    assert not multiprocessing.active_children()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"tiny-lm answers at {server.url}, context 2048 tokens, 2 copies"
    assert said[1] == f"copy {place} of 2 ended by SIGKILL; it had 1 request, and is started again"


def test_copies_of_a_plan_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, seen = tmp_path / "plan.json", list[tuple[Any, int]]()
    words = ["--devices", "6", "--chip", "h200", "--copies", "3", "--tensor-parallel", "2", "-o", str(out)]
    assert run(["plan", str(TINY), *words]) == 0
    monkeypatch.setattr(serving, "serve_model", lambda *given, **options: seen.append((given[2], options["copies"])))
    assert run([*WORDS, "--plan", str(out)]) == 0
    assert run(["run", str(out), *WORDS]) == 0
    assert [(config.ranks, config.placement.data, copies) for config, copies in seen] == [(2, 1, 3)] * 2
    assert run([*WORDS, "--data-parallel", "2", "--tensor-parallel", "2"]) == 0
    assert (seen[-1][0].ranks, seen[-1][1]) == (2, 2)
    capsys.readouterr()
    words = [*WORDS, "--plan", str(out), "--data-parallel", "2"]
    refused_in_one_line(words, 2, "--data-parallel is 2, and the plan is of 3 copies", monkeypatch, capsys)


@pytest.mark.parametrize(
    ("device", "stages", "message"),
    [
        ("cuda:1", 1, "device is cuda:1: 3 engines take a device each, say cuda"),
        ("auto", 2, "3 engines want 2 GPUs each, and this machine has 2"),
    ],
)
def test_copies_that_have_no_device_each_are_refused(
    device: str, stages: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = EngineConfig(device=device, pipeline_parallel=stages)
    with pytest.raises(InputError, match=message):
        serving.serve_model(str(TINY), ServerOptions(port=0), config, copies=3, say=print)


@pytest.mark.parametrize("more", [[], ["--pipeline-parallel", "2"]])
def test_copies_under_torchrun_are_refused(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    words = [*WORDS, "--data-parallel", "2", *more]
    refused_in_one_line(words, 2, "data_parallel is 2, and torchrun started this process", monkeypatch, capsys)


def test_a_taken_port_is_said_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["serve", str(TINY), "--device", "cpu", "--port", str(port)]
        refused_in_one_line(words, 1, f"cannot listen on 127.0.0.1 port {port}", monkeypatch, capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--port", "70000"], "port is 70000"),
        (["--max-queue", "0"], "max_queue is 0"),
        (["--api-key", ""], "the API key must be ASCII text"),
        (["--tool-parser", "hermse"], "did you mean 'hermes'"),
        (["--kv-dtype", "int8"], "kv_dtype 'int8'"),
        (["--activations", "fp9"], "fp9"),
    ],
)
def test_wrong_usage_is_one_line(
    more: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused_in_one_line([*WORDS, *more], 2, message, monkeypatch, capsys)


def test_a_process_that_torchrun_started_makes_the_model_and_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)

    def follow(model: str, **options: Any) -> None:
        made.append(options)
        raise SystemExit(0)

    monkeypatch.setattr("tersor.llm.LLM", follow)
    monkeypatch.setattr(serving, "bind", lambda options: pytest.fail("it listens"))
    with pytest.raises(SystemExit):
        run([*WORDS, "--pipeline-parallel", "2"])
    assert made[0]["pipeline_parallel"] == 2


def test_what_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: (name != "uvicorn" and found(name, *more)) or None
    )
    refused_in_one_line(WORDS, 1, "pip install 'tersor[serve]'", monkeypatch, capsys)
