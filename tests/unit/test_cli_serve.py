"""`tersor serve`: the bundled model behind HTTP, by the engine that serves GPUs too."""

from __future__ import annotations

import importlib.util
import multiprocessing
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch
from helpers import tiny_lm
from helpers.tiny_lm import TINY
from helpers.usage import refused_in_one_line

from tersor.cli.main import run
from tersor.engine.protocol import AsyncEngine
from tersor.server import serving
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
