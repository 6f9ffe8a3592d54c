"""Verbs on a GPU as users run them: whatever its name, whatever streams, they say what the engine says."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from helpers import packed_models, tiny_configs
from helpers.tiny_lm import TINY

import tersor
from tersor.cli import main
from tersor.server import serving

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPTS = ["def read_file(path):\n", "import os\n", "The first rule of"]
ENGINE = ["--kv-bytes", str(32 << 20), "--max-rows", "8", "--max-length", "256"]
OPTIONS: dict[str, Any] = {"kv_bytes": 32 << 20, "max_rows": 8, "max_length": 256}
GREEDY = tersor.SamplingParams(max_tokens=12, temperature=0)
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, compressed."""
    return packed_models.compressed(TINY, tmp_path_factory.mktemp("verbs") / "int4", format="int4", group_size=64)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[tersor.LLM]:
    made = tersor.LLM(model, device=DEVICE, **OPTIONS)
    yield made
    made.close()


def texts(engine: tersor.LLM) -> list[str]:
    return [output.outputs[0].text for output in engine.generate(PROMPTS, GREEDY)]


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a verb that must end well; return its JSON."""
    assert main.run([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def streaming(way: list[str], folder: Path) -> list[str]:
    """Return options of a verb with what belongs to weights that stream: one layer stays, and a folder of the disk."""
    stays = ["--resident-layers", "1"] if "--offload" in way else []
    return [*way, *stays, *(["--offload-directory", str(folder)] if "disk" in way else [])]


@contextmanager
def served(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """Run `tersor serve` in a thread while the block runs; it must end well."""
    ready: Future[int] = Future()
    servers: list[Any] = []

    def serve(engine: Any, options: Any, place: socket.socket) -> None:
        servers.append(serving.server_of(engine, options))
        place.listen()
        ready.set_result(place.getsockname()[1])
        servers[0].run(sockets=[place])

    monkeypatch.setattr(serving, "serve", serve)
    with ThreadPoolExecutor(1) as pool:
        status = pool.submit(main.run, ["serve", *words, "--port", "0"])
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{ready.result(120)}", timeout=60) as client:
                yield client
        finally:
            for server in servers:
                server.should_exit = True
            assert status.result(60) == 0


@pytest.mark.parametrize("way", [[], ["--offload", "host"], ["--offload", "disk"], ["--kv-dtype", "fp8"]], ids=str)
def test_a_server_says_what_the_engine_says(
    way: list[str], model: Path, engine: tersor.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"max_tokens": 12, "temperature": 0}
    with served([str(model), "--device", DEVICE, *ENGINE, *streaming(way, tmp_path)], monkeypatch) as client:
        found = [client.post("/v1/completions", json={**body, "prompt": one}).json() for one in PROMPTS]
        lines: list[str] = []
        with client.stream("POST", "/v1/completions", json={**body, "prompt": PROMPTS[0], "stream": True}) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        state = client.post("/v1/embeddings", json={"input": PROMPTS[2]}).json()["data"][0]["embedding"]
    said = [one["choices"][0]["text"] for one in found]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == said[0]
    (wanted,) = engine.embed([PROMPTS[2]])
    assert np.abs(np.asarray(state) - wanted.outputs.embedding).max() < (0.05 if "fp8" in way else 0.01)
    if "fp8" not in way:
        assert said == texts(engine)


def test_a_server_holds_an_answer_to_a_schema(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xgrammar")
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
    asked = {"prompt": "Give", "max_tokens": 40, "temperature": 0, "response_format": form}
    with served([str(model), "--device", DEVICE, *ENGINE], monkeypatch) as client:
        answer = client.post("/v1/completions", json=asked).json()
    assert json.loads(answer["choices"][0]["text"]) == {"a": "x"}


@pytest.mark.parametrize("way", [[], ["--data-parallel", "1"], ["--offload", "disk"]], ids=str)
def test_a_batch_is_answered_as_by_the_engine(
    way: list[str], model: Path, engine: tersor.LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    way = streaming(way, tmp_path / "streams")
    common = {"method": "POST", "url": "/v1/completions"}
    lines = [
        {"custom_id": str(row), **common, "body": {"prompt": prompt, "max_tokens": 12, "temperature": 0}}
        for row, prompt in enumerate(PROMPTS)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    threads = torch.get_num_threads()
    told = shown(["batch", "-m", str(model), *files, "--device", DEVICE, *ENGINE, *way], capsys)
    torch.set_num_threads(threads)
    assert (told["answered"], told["failed"]) == (len(PROMPTS), 0)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = {one["custom_id"]: one["response"]["body"]["choices"][0]["text"] for one in answers}
    assert [found[str(row)] for row in range(len(PROMPTS))] == texts(engine)


@pytest.mark.parametrize("device", ["auto", DEVICE, f"{DEVICE}:0"])
@pytest.mark.parametrize("way", [[], ["--offload", "host"], ["--offload", "disk"]], ids=str)
def test_a_prompt_is_continued_alike_whatever_the_gpu_is_called(
    way: list[str], device: str, model: Path, engine: tersor.LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(model), "--prompt", PROMPTS[0], "-n", "12", "--device", device]
    assert shown([*words, *streaming(way, tmp_path)], capsys)["text"] == texts(engine)[0]


@pytest.mark.parametrize("activations", ["8bit", "fp8", "int8", "int8:g128"])
def test_a_text_is_predicted_as_on_a_cpu(
    activations: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("def square(x):\n    return x * x\n\n" * 20, encoding="utf-8")
    words = ["eval", str(model), "--text", str(tmp_path / "text.txt"), "--window", "128", "--activations", activations]
    for more in ([], ["--kv-dtype", "fp8"]):
        here, there = (
            shown([*words, *more, "--device", device], capsys)["models"][0]["perplexity"] for device in ("cpu", DEVICE)
        )
        assert there == pytest.approx(here, rel=0.03)


def test_a_plan_is_made_for_this_gpu_and_run_on_it(
    model: Path, engine: tersor.LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(tmp_path / "plan.json")
    assert main.run(["plan", str(model), "--devices", "1", "--context", "256", "-o", plan]) == 0
    capsys.readouterr()
    words = ["run", plan, "generate", str(model), "--prompt", PROMPTS[0], "-n", "12", "--device", DEVICE]
    assert shown(words, capsys)["text"] == texts(engine)[0]
    found = tersor.LLM(model, plan=plan, device=DEVICE, **OPTIONS)
    assert texts(found) == texts(engine)
    found.close()


def test_kernels_are_compiled_for_this_gpu_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for activations in ("16bit", "int8"):
        words = ["compile", str(model), "--activations", activations, "--fuse"]
        first, again = shown(words, capsys), shown(words, capsys)
        assert first["kernels"] == again["kernels"] == again["from_cache"] > 0


def test_workloads_are_measured_with_what_this_gpu_reaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_configs.DENSE))
    sizes = [word for size in ("prefix=128", "own=20", "output=4", "members=4") for word in ("--size", size)]
    run = ["--format", "fp6_e3m2", "--device", DEVICE, "--max-rows", "8", "--max-step-tokens", "256"]
    words = ["bench", "throughput", str(tmp_path), "--workload", "micro", "--requests", "24", "--kv-bytes", "1000000"]
    found = shown([*words, *run, *sizes], capsys)
    assert {row["output_tokens"] for row in found["rows"]} == {96}
    assert found["speeds"] is not None


def test_the_demo_compares_formats(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--format", "fp6_e2m3", "--format", "int4", "-n", "4", "--window", "64", "--max-tokens", "128"]
    here, there = (shown([*words, "--device", device], capsys)["formats"] for device in ("cpu", DEVICE))
    for one, other in zip(there, here, strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=0.02)


@pytest.mark.parametrize("way", [{}, {"cuda_graph": False}, {"offload": "host", "resident_layers": 1}], ids=str)
def test_a_second_gpu_answers_as_the_first_whatever_the_current_one(way: dict[str, Any], model: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    found = []
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        made = tersor.LLM(model, device=device, **OPTIONS, **way)
        found.append(texts(made))
        made.close()
    assert found[0] == found[1] == found[2] and torch.cuda.current_device() == 0
