"""The command line of `tersor bench linear` and `tersor bench tune` where there is no GPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fakes import FakeGpu
from helpers.usage import refused_in_one_line

from tersor import ops
from tersor.bench import contenders, timing
from tersor.bench.contenders import Calls
from tersor.cli.main import run
from tersor.formats import Activations
from tersor.hardware import CHIPS, chip_named
from tersor.kernels import jit, tune
from tersor.kernels.tune import table
from tersor.layouts.packing import target_of

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "linear_h200.json"


def test_dry_run_on_a_named_chip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    arguments = [
        "bench",
        "linear",
        "llama-3-8b",
        "500x500",
        "--n",
        "1,128",
        "--format",
        "fp6_e3m2",
        "--format",
        "fp8_e6m1",
    ]
    assert run([*arguments, "--dry-run", "--chip", "a100", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("NVIDIA A100, 2.04 TB/s by its datasheet; nothing is timed\n")
    assert "llama-3-8b o_proj 4096x4096" in out
    assert out.endswith(f"written to {path}\n")
    plan = json.loads(path.read_text())
    assert (plan["chip"], plan["bandwidth"], len(plan["rows"])) == ("NVIDIA A100", 2.039e12, 20)
    first, second, third = plan["rows"][:3]
    assert first["weight_bytes"] == 6144 * 4096 * 6 // 8 + 2 * 6144
    assert first["roof_microseconds"] == round(first["weight_bytes"] / 2.039e6, 2)
    assert first["config"].startswith("sm80 schedule, tiles of 128 rows and 8 tokens")
    assert first["predicted_microseconds"] > first["roof_microseconds"]
    assert second["config"] == "decoded once for cuBLAS"
    assert third["config"] == "no kernel decodes it"
    assert run([*arguments, "--dry-run", "--chip", "a100", "--json", "--output", str(path)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == plan
    assert captured.err == f"written to {path}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["8x8"], 1, "timing needs a CUDA device, and torch sees none here: --dry-run"),
        (["8x8", "--output", "no/such/folder/x.json"], 2, "the folder no/such/folder does not exist"),
        (["8x8", "--plot", "x.txt"], 2, "a plot is written as"),
        (["8x8", "--plot", "x.png", "--dry-run", "--chip", "h200"], 2, "a dry run has no times to draw"),
        (["8x8", "--chip", "h200"], 2, "add --dry-run"),
        (["8x8", "--dry-run"], 2, "name one with --chip"),
        (["8x8", "--dry-run", "--chip", "h20"], 2, "unknown chip 'h20', did you mean 'NVIDIA H200'?"),
        (["--from", "x.json", "--dry-run"], 2, "--from shows times that were taken: leave out --dry-run"),
        (["--from", "no-such.json"], 2, "no-such.json: no such results file"),
        (["8x8", "--activations", "fp7"], 2, "did you mean 'fp8'?"),
        (["8x8", "--chain", "pld"], 2, "did you mean 'pdl'?"),
        (["8x8", "--dtype", "float32"], 2, "use float16 or bfloat16"),
        (["8x8", "--against", "marlin"], 2, "use cublas, fp8, humming or none"),
        (["8x8", "--n", "0"], 2, "--n '0'"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str],
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused_in_one_line(["bench", "linear", *arguments], status, words, monkeypatch, capsys)


def test_chips_by_short_names() -> None:
    assert chip_named("h200") is CHIPS["NVIDIA H200"]
    assert chip_named("NVIDIA H100") is CHIPS["NVIDIA H100"]
    assert chip_named("rtx-4090") is chip_named("RTX 4090") is CHIPS["NVIDIA GeForce RTX 4090"]


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of an H200: the reference multiplies, and a clock on the wall measures."""

    def microseconds(calls: Calls, replays: int = 9) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e6

    FakeGpu("NVIDIA H200").install(monkeypatch)
    monkeypatch.setattr(contenders, "random", lambda rows, columns, dtype: torch.randn(rows, columns, dtype=dtype))
    monkeypatch.setattr(
        ops,
        "preferred_layout",
        lambda scheme, dtype, device, activations: f"tiles_{target_of(Activations.NATIVE, dtype)}",
    )
    monkeypatch.setattr(jit, "compile_many", lambda sources, arch: [])
    monkeypatch.setattr(timing, "copies", lambda nbytes: 3)
    monkeypatch.setattr(timing, "read_bandwidth", lambda: 4e12)
    monkeypatch.setattr(timing, "graph_microseconds", microseconds)


def test_linear_from_end_to_end(pretended_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "r.json", tmp_path / "r.svg"
    arguments = ["64x64", "100x48", "--n", "1,8", "--format", "fp6_e3m2", "--format", "int4:g16", "--against", "cublas"]
    assert run(["bench", "linear", *arguments, "--output", str(path), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "float16 activations; a large read reaches 4.00 TB/s" in out
    assert out.endswith(f"written to {path}\nwritten to {picture}\n")
    assert "<svg" in picture.read_text()
    result = json.loads(path.read_text())
    assert len(result["rows"]) == 2 * 2 * (2 + 2 + 1)
    assert {row["kernel"] for row in result["rows"]} == {"fp6_e3m2", "int4:g16", "cublas"}
    assert all(row["microseconds"] > 0 for row in result["rows"])
    assert run(["bench", "linear", "64x64", "--n", "1", "--chain", "plain", "--against", "none", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["kernel"], row["chain"]) == ("fp6_e3m2", "plain")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """Return the rows of the committed results that options leave."""
    assert run(["bench", "linear", "--from", str(RESULTS), "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["rows"]


def test_times_that_were_taken_are_shown_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    taken = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert shown(capsys) == taken["rows"]
    output = tmp_path / "part.json"
    assert run(["bench", "linear", "8192x8192", "--n", "1", "--from", str(RESULTS), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "cublas" in out and "57344x8192" not in out
    assert out.endswith(f"written to {output}\n")
    part = json.loads(output.read_text())
    assert {(row["oc"], row["ic"], row["n"]) for row in part["rows"]} == {(8192, 8192, 1)}
    assert {key: part[key] for key in part if key != "rows"} == {key: taken[key] for key in taken if key != "rows"}


@pytest.mark.parametrize(
    ("arguments", "kernels", "chains"),
    [
        (["--chain", "pdl", "--against", "none"], {"fp6_e3m2", "fp6_e3m2:a8"}, {"pdl"}),
        (["--chain", "plain", "--activations", "16bit", "--against", "cublas"], {"fp6_e3m2", "cublas"}, {"plain"}),
        (["--activations", "fp8", "--against", "humming"], {"fp6_e3m2:a8", "humming fp6_e3m2:a8"}, {"pdl", "plain"}),
        (["--format", "int4", "--against", "fp8"], {"fp8"}, {"plain"}),
    ],
)
def test_options_narrow_what_was_taken(
    arguments: list[str], kernels: set[str], chains: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shown(capsys, "8192x8192", *arguments)
    assert {row["kernel"] for row in rows} == kernels
    assert {row["chain"] for row in rows} == chains


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("{", [], "cannot be read as JSON"),
        ("[]", [], "holds no times of tersor bench linear"),
        ('{"kind": "tersor bench linear", "version": 0}', [], "holds no times of tersor bench linear, version 1"),
        ("", ["--n", "3"], "the results file has no such times"),
    ],
)
def test_results_that_cannot_be_shown_are_one_line(
    text: str, arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = RESULTS
    if text:
        path = tmp_path / "r.json"
        path.write_text(text)
    assert run(["bench", "linear", "--from", str(path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert words in captured.err


def test_a_shape_that_fp8_does_not_take_is_told(pretended_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "linear", "100x48", "--n", "1", "--against", "fp8", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["skipped"][0]["kernel"] == "fp8"
    assert captured.err == "fp8 is not timed at 100x48: torch._scaled_mm takes channels in multiples of 16\n"


def test_tune_from_end_to_end(pretended_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chip = CHIPS["NVIDIA H200"]
    assert run(["bench", "tune", "64x256", "--n", "1,8,100", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["table"] == str(table.user_path(chip))
    assert [row["n"] for row in shown["choices"]] == [1, 8, 100]
    for problem, best in table.read(table.user_path(chip), chip, table.kernels_hash()).choices.items():
        assert tune.choose(problem, chip) == best.config
    output = tmp_path / "t.json"
    for shape, held in (("64x256", 1), ("128x256", 2)):
        assert run(["bench", "tune", shape, "--n", "8", "--output", str(output)]) == 0
        assert capsys.readouterr().out.endswith(f"choices written: 1 to {output}\n")
        assert len(table.read(output, chip).choices) == held
    output.write_text("{}")
    assert run(["bench", "tune", "64x256", "--n", "8", "--output", str(output)]) == 2
    assert capsys.readouterr().err.startswith(f"tersor: {output} is no table of measured choices")
