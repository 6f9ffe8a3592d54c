"""The command line of `tersor bench experts` where there is no GPU."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.usage import refused_in_one_line

from tersor import hardware, ops
from tersor.bench import timing
from tersor.bench.contenders import Calls
from tersor.bench.experts import contenders, geometry, measure, rivals
from tersor.cli.main import run
from tersor.formats import Activations
from tersor.layouts.packing import target_of


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 1, "timing needs a CUDA device, and torch sees none here: --from"),
        (["qwen3-30b"], 2, "no experts for 'qwen3-30b', did you mean 'qwen3-30b-a3b'?"),
        (["--n", "1,0"], 2, "--n '1,0'"),
        (["--format", "fp9"], 2, "--format fp9"),
        (["gpt-oss-20b", "--format", "int4:g128"], 2, "group size 128 does not divide the 2880"),
        (["--activations", "fp7"], 2, "did you mean 'fp8'?"),
        (["--dtype", "float32"], 2, "use float16 or bfloat16"),
        (["--against", "cublas"], 2, "use torch, compiled, humming or none"),
        (["--seed", "-1"], 2, "--seed"),
        (["--output", "no/such/folder/x.json"], 2, "the folder no/such/folder does not exist"),
        (["--from", "x.json", "--seed", "0"], 2, "--from shows times that were taken: leave out --dtype and --seed"),
        (["--from", "no-such.json"], 2, "no-such.json: no such results file: tersor bench experts --output writes one"),
        (["--from", "bench/results/linear_h200.json"], 2, "holds no times of tersor bench experts, version 1"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str],
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    refused_in_one_line(["bench", "experts", *arguments], status, words, monkeypatch, capsys)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of a GPU, a clock on the wall, and layers of a few small experts."""
    real_layer = measure.random_layer

    def microseconds(calls: Calls) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e6

    small = {
        name: replace(whole, experts=min(whole.experts, 32), top_k=2, hidden=64, ffn=32)
        for name, whole in geometry.MODELS.items()
    }
    monkeypatch.setattr(geometry, "MODELS", small)
    monkeypatch.setattr(measure, "_READ", 1)
    monkeypatch.setattr(rivals, "compiled", lambda function, **options: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(
        measure, "random_layer", lambda shape, dtype, device, seed: real_layer(shape, dtype, torch.device("cpu"), seed)
    )
    monkeypatch.setattr(hardware, "cuda_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(timing, "read_bandwidth", lambda: 4e12)
    monkeypatch.setattr(timing, "graph_microseconds", microseconds)
    monkeypatch.setattr(contenders, "grouped", SimpleNamespace(obstacle=lambda x, gate_up, down: ""))
    monkeypatch.setattr(
        ops, "preferred_layout", lambda scheme, dtype, device, kind: f"tiles_{target_of(Activations.of(kind), dtype)}"
    )


def shown(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Return the rows of a results file that options leave."""
    assert run(["bench", "experts", "--from", str(path), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_experts_from_end_to_end(pretended_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, part = tmp_path / "r.json", tmp_path / "part.json"
    arguments = ["olmoe", "gpt-oss-20b", "--n", "1,8", "--format", "fp6_e3m2", "--format", "int4:g16"]
    assert (
        run(["bench", "experts", *arguments, "--against", "torch,compiled", "--seed", "5", "--output", str(path)]) == 0
    )
    captured = capsys.readouterr()
    assert "bfloat16 activations; a large read reaches 4.00 TB/s" in captured.out
    assert "x torch" in captured.out and "humming" not in captured.out
    assert captured.out.endswith(f"written to {path}\n") and captured.err == ""
    taken = json.loads(path.read_text())
    assert (taken["kind"], taken["seed"], taken["skipped"]) == (measure.KIND, 5, [])
    assert len(taken["rows"]) == 2 * 2 * (2 + 4)
    assert all(row["microseconds"] > 0 and row["hit_bytes"] > 0 for row in taken["rows"])
    assert shown(capsys, path) == taken["rows"]
    assert {row["kernel"] for row in shown(capsys, path, "--format", "int4:g16", "--against", "none")} == {"int4:g16"}
    assert {row["kernel"] for row in shown(capsys, path, "--activations", "fp8")} == {"torch", "compiled"}
    assert run(["bench", "experts", "olmoe", "--n", "8", "--from", str(path), "--output", str(part)]) == 0
    assert capsys.readouterr().out.endswith(f"written to {part}\n")
    narrowed = json.loads(part.read_text())
    assert {(row["name"], row["n"]) for row in narrowed["rows"]} == {("olmoe", 8)}
    assert {**narrowed, "rows": taken["rows"]} == taken
    assert run(["bench", "experts", "--n", "3", "--from", str(path)]) == 2
    assert "the results file has no such times" in capsys.readouterr().err


def test_who_computes_something_else_is_not_timed(
    pretended_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ops.routed_experts
    monkeypatch.setattr(ops, "routed_experts", lambda x, logits, *rest, **how: real(x, -logits, *rest, **how))
    assert run(["bench", "experts", "olmoe", "--n", "8", "--against", "torch"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("fp6_e3m2 is not timed at olmoe, 8 tokens: its output is off by 1.")
    assert captured.err.count("\n") == 1
    (line,) = [line for line in captured.out.splitlines() if line.strip().startswith("olmoe")]
    assert line.split()[:7] == ["olmoe", "8", "fp6_e3m2", *line.split()[3:4], "-", "-", "-"]
