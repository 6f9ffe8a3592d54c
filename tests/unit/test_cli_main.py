"""The command itself: version, help, usage errors, exit statuses."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

import tersor
from tersor.cli import main
from tersor.errors import InputError, KernelError, OutputError, TersorError

VERBS = (
    "quantize",
    "prune",
    "inspect",
    "eval",
    "report",
    "generate",
    "serve",
    "batch",
    "plan",
    "run",
    "bench",
    "compile",
    "doctor",
    "demo",
)


def run(*arguments: str) -> int:
    """Run one command line in this process."""
    return main.run(list(arguments))


def test_the_verbs_are_these() -> None:
    assert tuple(main.VERBS) == VERBS


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"tersor {tersor.__version__}\n"


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    status = run()
    captured = capsys.readouterr()
    assert status in (0, 2)
    for verb in VERBS:
        assert verb in captured.out + captured.err


def test_help_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for verb, (_, summary) in main.VERBS.items():
        assert verb in text
        assert summary.split(".")[0][:40] in text


@pytest.mark.parametrize(
    "verb", [*(verb for verb in VERBS if verb != "bench"), "bench linear", "bench experts", "bench tune"]
)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*verb.split(), "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: tersor {verb} ")
    assert ("--json" in text) == (verb not in ("serve", "run"))  # a server prints nothing, and run what its verb does


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quantise",), ("quantise",)),
        (("--versoin",), ("--versoin",)),
        (("quantize", "model", "--formt", "fp6"), ("--formt", "tersor quantize --help")),
        (("quantize",), ("MODEL", "tersor quantize --help")),
        (("quantize", "model", "--group-size", "many"), ("--group-size", "valid int")),
        (("inspect", "one", "two"), ("two",)),
        (("generate",), ("tersor generate --help",)),
        (("bench",), ("Missing command", "tersor bench --help")),
        (
            ("bench", "lineer"),
            ("did you mean 'linear'?", "verbs: linear, experts, latency, throughput, tune", "tersor bench --help"),
        ),
        (("bench", "linear", "--chian", "pdl"), ("--chian", "tersor bench linear --help")),
        (("eval", "model"), ("--text",)),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tersor: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    for word in words:
        assert word in captured.err


def test_a_misspelt_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", "model", "--formt", "fp6") == 2
    assert "--format" in capsys.readouterr().err


def test_a_misspelt_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantise") == 2
    assert "did you mean 'quantize'?" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `tersor inspect MODEL` raise what it is given."""

    def install(error: BaseException) -> None:
        def command(model: str) -> None:
            raise error

        module = SimpleNamespace(command=command)
        real = importlib.import_module

        def import_module(name: str, package: str | None = None) -> object:
            return module if name == "tersor.cli.inspect" else real(name, package)

        monkeypatch.setattr(main.importlib, "import_module", import_module)

    return install


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("no directory here"), 2),
        (TersorError("it broke"), 1),
        (OutputError("no space left"), 1),
        (KernelError("does not launch"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_a_status(
    error: BaseException, status: int, failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(error)
    assert run("inspect", "model") == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"tersor: {error if str(error) else 'interrupted'}\n"


def test_a_bug_is_not_dressed_up_as_an_error(failing: Callable[[BaseException], None]) -> None:
    failing(ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        run("inspect", "model")


def test_the_module_and_its_status_reach_the_shell() -> None:
    done = subprocess.run([sys.executable, "-m", "tersor", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tersor {tersor.__version__}\n"
    command = [sys.executable, "-m", "tersor", "inspect", "--no-such-option"]  # refused before anything heavy is loaded
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tersor: ")
    assert done.stderr.count("\n") == 1
    assert "--no-such-option" in done.stderr


def test_a_reader_that_stops_early_ends_the_command_quietly() -> None:
    code = "import sys; from tersor.cli.main import run; sys.exit(run(['--help']))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run([sys.executable, "-c", code], stdout=closed, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
