"""Paths that cannot be looked at, read or written: one line in every verb, status 2 for the input, 1 for the output."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import tiny_lm

from tersor.cli.main import run

TINY = str(tiny_lm.TINY)
ROOT = Path(__file__).resolve().parents[2]
TEXT = str(ROOT / "docs" / "settings.md")
RESULTS = str(ROOT / "bench" / "results" / "latency_h200.json")


def looped(folder: Path) -> str:
    (folder / "loop").symlink_to(folder / "loop")
    return str(folder / "loop")


def below_a_file(folder: Path) -> str:
    (folder / "file").write_text("x")
    return str(folder / "file" / "x.svg")


def forbidden(folder: Path) -> str:
    return str(folder / "forbidden" / "x.svg")


BAD: dict[str, Callable[[Path], str]] = {
    "empty": lambda folder: "",
    "NUL": lambda folder: str(folder / "a\0b.svg"),
    "too long": lambda folder: str(folder / ("x" * 300 + ".svg")),
    "surrogate": lambda folder: str(folder / "\ud800.svg"),
    "no such user": lambda folder: "~no-such-user-here/x.svg",
    "loop of links": looped,
    "below a file": below_a_file,
    "forbidden": forbidden,
}

INPUTS: dict[str, Callable[[str], list[str]]] = {
    "quantize": lambda path: ["quantize", path, "--dry-run"],
    "inspect": lambda path: ["inspect", path],
    "eval": lambda path: ["eval", path, "--text", TEXT],
    "eval --reference": lambda path: ["eval", TINY, "--text", TEXT, "--reference", path],
    "eval --text": lambda path: ["eval", TINY, "--text", path],
    "generate": lambda path: ["generate", path, "--prompt", "x"],
    "compile": lambda path: ["compile", path, "--chip", "h200"],
    "demo": lambda path: ["demo", "--model", path],
    "bench linear": lambda path: ["bench", "linear", path, "--dry-run", "--chip", "h200"],
    "report": lambda path: ["report", path, "--json"],
    "bench linear --from": lambda path: ["bench", "linear", "--from", path],
}

OUTPUTS: dict[str, Callable[[str], list[str]]] = {
    "quantize -o": lambda path: ["quantize", TINY, "-o", path],
    "eval --plot": lambda path: ["eval", TINY, "--text", TEXT, "--plot", path],
    "report --output": lambda path: ["report", RESULTS, "-o", path],
    "bench linear --plot": lambda path: ["bench", "linear", "8x32", "--plot", path],
    "bench latency --plot": lambda path: ["bench", "latency", "--plot", path],
    "bench throughput --plot": lambda path: ["bench", "throughput", "--plot", path],
    "bench linear --output": lambda path: ["bench", "linear", "8x32", "--dry-run", "--chip", "h200", "-o", path],
    "bench tune --output": lambda path: ["bench", "tune", "8x32", "--output", path],
}


@pytest.fixture(autouse=True)
def no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid what is below a folder called `forbidden`, as the system does for everyone but root."""
    real = os.stat

    def stat(path: object, *args: object, **options: object) -> os.stat_result:
        if isinstance(path, (str, Path)) and "forbidden" in Path(path).parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)


def one_line(words: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(words) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tersor: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("option", INPUTS)
def test_an_input_that_cannot_be_looked_at_is_one_line_and_status_2(
    option: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_line(INPUTS[option](BAD[kind](tmp_path)), 2, capsys)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("option", OUTPUTS)
def test_an_output_that_cannot_be_written_is_one_line(
    option: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = BAD[kind](tmp_path)
    # No suffix that a plot is written with is wrong usage, and so is what the parser of options takes for no path.
    usage = (kind in ("loop of links", "empty") and "plot" in option) or (
        kind in ("NUL", "surrogate") and option != "quantize -o"
    )
    one_line(OUTPUTS[option](path), 2 if usage else 1, capsys)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nothing", path)])
def test_what_is_no_regular_file_is_one_line_and_keeps_nobody_waiting(
    name: str, make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tiny_lm.copy(tmp_path / "model")
    (copy / name).unlink()
    make(copy / name)
    for verb in (["inspect"], ["quantize", "--dry-run"], ["generate", "--prompt", "x"]):
        assert name in one_line([*verb, str(copy)], 2, capsys)


def test_a_name_of_two_lines_is_told_on_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert r"two\nlines" in one_line(["inspect", "./two\nlines/model"], 2, capsys)
