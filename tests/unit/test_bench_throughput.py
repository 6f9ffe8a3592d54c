"""Workloads through the engine: what a plan saves of what can be, what it costs, and the verb that measures it."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.usage import refused_in_one_line

from tersor import hardware
from tersor.bench import throughput, timing, workloads
from tersor.bench.roofline import Speeds
from tersor.bench.throughput import Throughput
from tersor.cli import bench_throughput
from tersor.cli.main import run
from tersor.engine.limits import Limits
from tersor.engine.request import Step
from tersor.formats import Activations

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@dataclass
class Nothing:
    """A step of a model that does nothing: every token is 5."""

    step: Step
    logprobs: None = field(default=None, init=False)
    prompt_logprobs: None = field(default=None, init=False)
    states: None = field(default=None, init=False)

    def tokens(self) -> list[int]:
        return [5] * len(self.step.drawing)


class Idle:
    """Runs steps of it."""

    def launch(self, step: Step, masks: Any) -> Nothing:
        return Nothing(step)


def orders(name: str, requests: int, pages: int, **sizes: float) -> dict[str, Throughput]:
    """Run a workload in every order, in so few pages."""
    load = workloads.make(name, requests=requests, **sizes)
    limits = Limits(pages=pages, max_rows=256, max_step_tokens=8192, context=throughput.context_of(load))
    return {order: throughput.measure(Idle(), limits, load, order, "idle", "-") for order in throughput.ORDERS}


@pytest.mark.parametrize(("name", "requests", "pages"), [("micro", 320, 600), ("extreme", 64, 500), ("tree", 300, 400)])
def test_a_plan_reuses_what_can_be_however_few_pages_there_are(name: str, requests: int, pages: int) -> None:
    found = orders(name, requests, pages, output=20)
    planned, ordered, shuffled = (found[order] for order in throughput.ORDERS)
    assert planned.reuse >= 0.95 * planned.optimum
    assert planned.reuse >= ordered.reuse > shuffled.reuse
    assert planned.steps <= 1.02 * ordered.steps < shuffled.steps
    assert planned.steps * planned.step_tokens <= ordered.steps * ordered.step_tokens
    assert planned.preemptions == 0
    assert pages / 3 < planned.high_water <= planned.pages == pages - 1


def test_continuations_of_a_prompt_are_prompts_that_share_it() -> None:
    found = orders("sampling", 4, 2000, prompt=4000, output=8, samples=4)["planned"]
    assert found.requests == 4
    assert 0.95 * found.optimum <= found.reuse <= found.optimum


def test_without_shared_prefixes_a_plan_costs_less_than_a_fiftieth_of_the_time_of_a_request() -> None:
    load = workloads.make("control", requests=100, output=20)
    limits = Limits(pages=8000, max_rows=256, max_step_tokens=8192, context=throughput.context_of(load))
    taken: dict[str, list[float]] = {"planned": [], "shuffled": []}
    for order in ("planned", "shuffled") * 3:
        begun = time.process_time()
        throughput.measure(Idle(), limits, load, order, "idle", "-")
        taken[order].append(time.process_time() - begun)
    wanted = 1 / 19  # seconds a request of 2,200 tokens and 100 drawn, on the GPU that the target is for
    assert (min(taken["planned"]) - min(taken["shuffled"])) / 100 < 0.02 * wanted


def words(folder: Path, *more: str) -> list[str]:
    (folder / "config.json").write_text(json.dumps(TINY))
    sizes = [word for size in ("prefix=128", "own=20", "output=4", "members=4") for word in ("--size", size)]
    engine = ["--format", "16bit", "--device", "cpu", "--max-rows", "8", "--max-step-tokens", "256"]
    return ["bench", "throughput", str(folder), "--requests", "24", "--kv-bytes", "1000000", *engine, *sizes, *more]


def test_the_verb_measures_every_order_and_shows_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert run(words(tmp_path, "-o", str(tmp_path / "found.json"), "--workload", "micro", "--json")) == 0
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert [row["order"] for row in found["rows"]] == list(throughput.ORDERS)
    assert {row["output_tokens"] for row in found["rows"]} == {96}
    assert found["rows"][0]["reuse"] == pytest.approx(found["rows"][0]["optimum"])
    assert found["workloads"]["micro"]["members"] == 4
    assert found["speeds"] is None and found["rooflines"] == {}
    assert {row["roofline_seconds"] for row in found["rows"]} == {None}
    assert run(["bench", "throughput", "--from", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert "planned" in shown and "100.0 %" in shown and "requests/s" in shown


def test_what_a_gpu_does_at_most_is_its_datasheet_and_what_was_measured_whose_memory_is_free_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "device", lambda where: nullcontext(done.append(str(where))))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(timing, "read_bandwidth", lambda: float(bool(done.append("read"))) + 4e12)
    monkeypatch.setattr(hardware, "of_device", lambda index: {1: hardware.chip_named("h200")}[index])
    speeds = bench_throughput._speeds(torch.device("cuda:1"), Activations.E4M3)
    assert speeds == Speeds(linear_peak=1978.8e12, attention_peak=989.4e12, bandwidth=4e12)
    assert done == ["cuda:1", "read", "emptied"]


def test_on_a_gpu_every_run_has_the_roofline_of_its_workload_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = Speeds(linear_peak=1e12, attention_peak=1e12, bandwidth=2e9)
    monkeypatch.setattr(bench_throughput, "_speeds", lambda where, activations: speeds)
    threads = torch.get_num_threads()
    assert run(words(tmp_path, "--workload", "micro", "--order", "planned,shuffled", "--json")) == 0
    torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert found["speeds"] == {"linear_peak": 1e12, "attention_peak": 1e12, "bandwidth": 2e9}
    (least,) = found["rooflines"].values()
    assert least["seconds"] == (least["weight_bytes"] + least["kv_bytes"]) / 2e9  # the memory is what is slow here
    qkv, behind = 3 * 32 * 32, 32 * 32 + 3 * 32 * 64 + 300 * 32  # of the only layer, and the head
    assert least["linear_operations"] == 2 * (qkv * (6 * 128 + 24 * 20 + 24 * 3) + behind * 24 * 4)
    assert {row["roofline_seconds"] for row in found["rows"]} == {least["seconds"]}
    for row in found["rows"]:
        assert row["seconds"] > least["seconds"] and row["steps"] >= least["steps"] == 12
        assert row["steps"] * row["step_tokens"] >= 6 * 128 + 24 * 20 + 24 * 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--order", "plan"], "did you mean 'planned'"),
        (["--workload", "micor"], "did you mean 'micro'"),
        (["--size", "prefix"], "expected a name and a number"),
        (["--size", "prefxi=3"], "did you mean 'prefix'"),
        (["--from", "nowhere.json"], "no such results file"),
        (["--activations", "fp7"], "fp7"),
        (["--kv-bytes", "10"], "fit beside the weights"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(
    more: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = 1 if "--kv-bytes" in more else 2
    refused_in_one_line(words(tmp_path, *more), status, message, monkeypatch, capsys)
