"""The command line of `tersor bench linear` and `tersor bench tune` where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tersor.cli.main import run
from tersor.hardware import CHIPS, chip_named


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
        "uint4",
    ]
    assert run([*arguments, "--dry-run", "--chip", "a100", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("NVIDIA A100, 2.04 TB/s by its datasheet; nothing is timed\n")
    assert "llama-3-8b o_proj 4096x4096" in out
    plan = json.loads(path.read_text())
    assert (plan["chip"], plan["bandwidth"], len(plan["rows"])) == ("NVIDIA A100", 2.039e12, 20)
    first, second, third = plan["rows"][:3]
    assert first["weight_bytes"] == 6144 * 4096 * 6 // 8 + 2 * 6144
    assert first["roof_microseconds"] == round(first["weight_bytes"] / 2.039e6, 2)
    assert first["config"].startswith("sm80 schedule, 8 tokens")
    assert first["predicted_microseconds"] > first["roof_microseconds"]
    assert second["config"] == "decoded once for cuBLAS"
    assert third["config"] == "no kernel decodes it"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["8x8"], 1, "timing needs a CUDA device, and torch sees none here: --dry-run"),
        (["8x8", "--json", "no/such/folder/x.json"], 2, "the folder no/such/folder does not exist"),
        (["8x8", "--plot", "x.txt"], 2, "a plot is written as"),
        (["8x8", "--plot", "x.png", "--dry-run", "--chip", "h200"], 2, "a dry run has no times to draw"),
        (["8x8", "--chip", "h200"], 2, "add --dry-run"),
        (["8x8", "--dry-run"], 2, "name one with --chip"),
        (["8x8", "--dry-run", "--chip", "h20"], 2, "unknown chip 'h20', did you mean 'NVIDIA H200'?"),
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["bench", "linear", *arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_chips_by_short_names() -> None:
    assert chip_named("h200") is CHIPS["NVIDIA H200"]
    assert chip_named("NVIDIA H100") is CHIPS["NVIDIA H100"]
    assert chip_named("rtx-4090") is chip_named("RTX 4090") is CHIPS["NVIDIA RTX 4090"]
