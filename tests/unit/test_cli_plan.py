"""`tersor plan`: the commands of docs/planning.md run, reports say what a plan holds, bad input is one line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers.fakes import FakeGpu

from tersor.cli.main import run
from tersor.planner.plan import read

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, whatever the machine."""
    FakeGpu().install(monkeypatch)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that succeeds prints."""
    status = run(["plan", *words])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a command that fails."""
    assert run(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and not captured.out
    return captured.err


def test_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    lines = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) >= 6
    for line in lines:
        verb, *words = shlex.split(line)[0:1], *shlex.split(line)[1:]
        assert verb == ["tersor"] and words[0] == "plan"
        assert told(capsys, *words[1:]).strip(), line
    assert read(tmp_path / "plan.json").model == "llama-3-70b"


def test_every_option_of_the_table_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    told_help = told(capsys, "--help")
    for option in re.findall(r"`(--[a-z-]+)`", PAGE):
        assert option in told_help, option


def test_the_report_shows_stages_cuts_times_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "llama-3-70b", "--devices", "8", "--chip", "h200")
    for words in (
        "llama-3-70b on 8 x NVIDIA H200 (1x8), by latency",
        "DP1 PP1 TP8",
        "at most 0.00 % above the best",
        "0-79 + embedding + head",
        "rows 8 x 1024",
        "vocabulary (R to V)",
        "Other ways to deal out the GPUs",
        "model's own",
        "all tensor",
    ):
        assert words in text, words


def test_sources_are_told_for_parts(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(
        capsys, "llama-3-8b", "--format", "fp6", "--devices", "2", "--chip", "h200", "--explain", "decode.layers"
    )
    assert "kernels.tune for NVIDIA H200" in text and "bench/results/latency_h200" in text
    assert "the plan has no part 'colour'" in refused(
        capsys, "llama-3-8b", "--devices", "2", "--chip", "h200", "--explain", "colour"
    )


def test_json_is_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    text = told(capsys, "opt-6.7b", "--devices", "3", "--chip", "h100", "--json", "-o", str(path))
    found = json.loads(text)
    assert found == json.loads(path.read_text(encoding="utf-8"))
    assert (found["kind"], found["version"], found["chip"]) == ("tersor plan", 1, "NVIDIA H100")


def test_a_plan_is_checked_for_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "plan.json")
    told(capsys, "llama-3-8b", "--devices", "2", "--chip", "h200", "-o", path)
    assert "checked for llama-3-8b" in told(capsys, "llama-3-8b", "--from", path)
    assert "the plan is for model" in refused(capsys, "llama-3-8b", "--format", "int8", "--from", path)
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    Path(path).write_text(json.dumps(raw | {"version": 9}), encoding="utf-8")
    assert "is version 9 of plans, and this Tersor reads 1" in refused(capsys, "--from", path)


@pytest.mark.parametrize(
    "words, line",
    [
        ((), "name a model, or a plan to show with --from FILE"),
        (("llama-3-8b", "--chip", "h200"), "say how many devices there are"),
        (("llama-3-8b", "--devices", "2"), "torch sees no GPU to plan for: name one with --chip"),
        (("llama-3-8b", "--devices", "2", "--chip", "h900"), "unknown chip 'h900'"),
        (
            ("llama-3-8b", "--devices", "2", "--chip", "h200", "--phase", "decod"),
            "phase 'decod', did you mean 'decode'",
        ),
        (("llama-3-8b", "--devices", "2", "--chip", "h200", "--kv-dtype", "int2"), "kv dtype 'int2'"),
        (("llama-3-8b", "--devices", "2", "--chip", "h200", "--search", "best"), "no search 'best'"),
        (("llama-3-8b", "--devices", "2", "--chip", "h200", "--links", "none.json"), "none.json: No such file"),
        (("llama-3-8b", "--devices", "2", "--chip", "h200", "--format", "fp99"), "fp99"),
        (("llama-3-70b", "--devices", "1", "--chip", "h200"), "no plan fits: DP1 PP1 TP1 cannot hold llama-3-70b"),
        (("llama-3-8b", "--mesh", "3x", "--chip", "h200"), "mesh '3x'"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str) -> None:
    assert line in refused(capsys, *words)


def test_nothing_is_written_where_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "llama-3.1-405b", "--devices", "2", "--chip", "h200", "-o", str(tmp_path / "plan.json"))
    assert not list(tmp_path.iterdir())


def test_a_plan_for_the_gpu_here_is_one_for_its_chip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from tersor.cli import chips
    from tersor.hardware import CHIPS

    own = replace(CHIPS["NVIDIA H100"], name="NVIDIA H100 80GB HBM3", memory_bytes=85 * 10**9)
    monkeypatch.setattr(chips, "wanted", lambda name, purpose: [own])
    path = str(tmp_path / "plan.json")
    told(capsys, "llama-3-8b", "--devices", "2", "-o", path)
    assert read(Path(path)).chip == "NVIDIA H100"
    assert "checked for llama-3-8b" in told(capsys, "llama-3-8b", "--from", path)


def test_a_plan_for_a_gpu_that_is_named_like_a_larger_one_is_for_the_gpu_here_and_read_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from tersor.hardware import CHIPS

    desktop, path = CHIPS["NVIDIA GeForce RTX 4090"], str(tmp_path / "plan.json")
    laptop = replace(desktop, name=f"{desktop.name} Laptop GPU", memory_bytes=16 << 30, sms=76)
    FakeGpu(laptop).install(monkeypatch)
    assert f"4 x {laptop.name} (1x4)" in told(capsys, "llama-3-8b", "--devices", "4", "-o", path)
    assert "checked for llama-3-8b" in told(capsys, "llama-3-8b", "--from", path)
    FakeGpu(desktop).install(monkeypatch)
    assert f"unknown chip '{laptop.name}'" in refused(capsys, "llama-3-8b", "--from", path)


def test_keys_and_values_in_8_bits_take_half_as_much(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = []
    for kind in ("16bit", "fp8"):
        path = tmp_path / f"{kind}.json"
        told(capsys, "llama-3-8b", "--devices", "1", "--chip", "h200", "--kv-dtype", kind, "-o", str(path))
        sizes.append(read(path).stages[0].memory[0].kv)
    assert sizes[1] / sizes[0] == pytest.approx(132 / 256)  # with a float32 scale a token and head
