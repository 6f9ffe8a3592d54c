"""`tersor demo`, with everything about it made small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import tiny_lm

from tersor.cli import demo
from tersor.cli.main import run

SMALL = ["--window", "64", "--max-tokens", "128", "-n", "3", "--device", "cpu"]


def test_the_bundled_model_is_found_in_a_checkout() -> None:
    assert demo.MODEL == tiny_lm.TINY and demo.MODEL.is_dir()


def test_every_format_has_a_row_and_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "kept"
    output.mkdir()
    formats = ["--format", "fp6_e3m2", "--format", "int4"]
    assert run(["demo", *SMALL, *formats, "--output", str(output), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    original, six, four = result["formats"]
    assert [row["format"] for row in result["formats"]] == ["original", "fp6_e3m2", "int4"]
    assert original["kl"] == 0 and 0 < six["kl"] < four["kl"]
    assert original["weight_bytes"] > six["weight_bytes"] > four["weight_bytes"]
    assert (original["bits_per_weight"], int(six["bits_per_weight"]), int(four["bits_per_weight"])) == (16, 6, 4)
    assert all(row["tokens_per_second"] > 0 and row["windows"] == 2 for row in result["formats"])
    assert sorted(path.name for path in output.iterdir()) == ["fp6_e3m2", "int4"]


def test_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", *SMALL, "--format", "fp6_e2m3"]) == 0
    out = capsys.readouterr().out
    table = out[: out.index("---")]
    assert "original" in table and "fp6_e2m3" in table
    row = next(line for line in table.splitlines() if line.strip().startswith("fp6_e2m3"))
    assert len(row.rstrip()) < 80
    assert "--- fp6_e2m3 continues" in out


def test_own_text_is_the_documentation_and_then_the_sources() -> None:
    text = demo.own_text()
    assert text == demo.own_text()
    readme = (demo.CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert text.startswith(readme)
    assert (demo.PACKAGE / "formats" / "element.py").read_text(encoding="utf-8") in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "fp6_e4m2"], "fp6_e4m2"),
        (["--device", "cuda"], "no CUDA GPU"),
        (["--model", "/nonexistent/model"], "/nonexistent/model"),
        (["--window", "1"], "window is 1"),
        (["--fast"], "--fast"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tersor.hardware.cuda_available", lambda: False)
    assert run(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_without_a_checkout_it_asks_for_a_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MODEL", tmp_path / "no")
    assert run(["demo", "--device", "cpu"]) == 2
    assert "examples/tiny-lm" in capsys.readouterr().err
