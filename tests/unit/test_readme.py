"""README.md is true: its commands and its Python run, its targets exist, its table is the one of the results."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import tersor
from tersor.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT_CHARACTERS = 4000
"""Of the text that commands evaluate models on: some windows, not all."""
MARKER = re.compile(r"<!-- (bench/results/\S+\.json) -->\n(.*?)<!-- end -->", re.DOTALL)


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Return every shell command as its words, comments taken off; a pipe is a word."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in that looks like a checkout; a hub that holds the tiny model."""
    import huggingface_hub

    for name in ("bench", "examples", "src", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "formats.md").write_text(text[:TEXT_CHARACTERS], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **options: str(ROOT / "examples" / "tiny-lm")
    )
    return tmp_path


def test_commands_are_of_kinds_a_test_knows() -> None:
    assert {words[0] for words in commands()} <= {"make", "pip", "tersor", "echo", "curl"}
    shown = {words[words.index("tersor") + 1] for words in commands() if "tersor" in words}
    assert shown == set(main.VERBS)


@pytest.mark.timeout(600)
def test_tersor_commands_run(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, since later ones use what earlier ones made."""
    for words in commands():
        if "tersor" not in words or measures(words) or "serve" in words:
            continue
        start = words.index("tersor")
        if start:
            assert (words[0], words[start - 1]) == ("echo", "|")
            given = io.TextIOWrapper(io.BytesIO((" ".join(words[1 : start - 1]) + "\n").encode()))
            monkeypatch.setattr(sys, "stdin", given)
        status = main.run(words[start + 1 :])
        captured = capsys.readouterr()
        assert status == 0, f"{shlex.join(words)}: {captured.err}"
        assert captured.out.strip(), shlex.join(words)
    assert {path.name for path in scratch.glob("tiny-*")} == {
        "tiny-fp6",
        "tiny-mixed",
        "tiny-mix",
        "tiny-mxfp6",
        "tiny-gptq",
        "tiny-sparse",
        "tiny-half",
        "tiny-outliers",
    }


@pytest.mark.timeout(600)
def test_the_server_answers_as_the_readme_asks_it(scratch: Path) -> None:
    tersor.quantize("examples/tiny-lm", "tiny-fp6", format="fp6_e3m2")
    served = next(words for words in commands() if words[:2] == ["tersor", "serve"])
    asked = next(words for words in commands() if words[0] == "curl")
    assert served[-1] == "&" and f":{served[served.index('--port') + 1]}/" in asked[1]
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    words = [sys.executable, "-m", "tersor", *served[1 : served.index("--port")], "--port", str(port)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            for line in server.stderr:
                if str(port) in line:
                    break
            url = re.sub(r":\d+/", f":{port}/", asked[1])
            body = asked[asked.index("-d") + 1].encode()
            header = asked[asked.index("-H") + 1].split(": ")
            request = urllib.request.Request(url, body, {header[0]: header[1]})
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = json.load(response)
            assert answer["model"] == "tiny-fp6" and answer["usage"]["completion_tokens"] <= 20
            assert answer["choices"][0]["text"]
        finally:
            server.send_signal(signal.SIGINT)
            rest = server.stderr.read()
    assert server.returncode in (0, 130), rest


def measures(words: list[str]) -> bool:
    """Tell whether a command times kernels, for which it takes a GPU, and minutes there."""
    return "bench" in words and not {"--dry-run", "--from"} & set(words)


@pytest.mark.parametrize("words", [words for words in commands() if measures(words)], ids=" ".join)
def test_commands_that_measure_ask_for_a_gpu(
    words: list[str], scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What comes before the measuring runs: names and options are right."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.run(words[1:]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("tersor: timing needs a CUDA device")
    assert captured.err.count("\n") == 1


@pytest.mark.timeout(600)
def test_python_runs(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["codes"].tolist() == [12, 40, 31]
    assert names["y"].shape == (3, 256)
    shown = capsys.readouterr().out
    assert "6.05 bits a weight" in shown
    assert "reference" in shown
    assert json.loads((scratch / "tiny-int4" / "config.json").read_text())["quantization_config"]["format"] == "int4"


def test_make_targets_and_extras_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = set(metadata.metadata("tersor").get_all("Provides-Extra") or [])
    for words in commands():
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        if words[0] == "pip":
            assert words[1] == "install"
            match = re.fullmatch(r"\.(?:\[(\w+)\])?", words[2])
            assert match, words
            assert match[1] is None or match[1] in extras


def test_the_first_screen_has_three_lines_the_picture_and_two_commands() -> None:
    screen = README.splitlines()[:22]
    text = "\n".join(screen)
    assert len([line for line in screen[1 : screen.index("", 2)] if line]) == 3
    assert text.index("![") < text.index("make demo") < text.index("make test")
    assert README.index("| weight |") > README.index("## Measured") > README.index("## Install")


def described(picture: Path) -> str:
    """Return what an SVG's metadata say of the times that it shows."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", picture.read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def test_the_picture_shows_the_results_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Makefile's command draws it; drawn again, it says the same of the same times."""
    pytest.importorskip("matplotlib")
    (name,) = re.findall(r"!\[[^]]+\]\((\S+)\)", README)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    variables = dict(re.findall(r"^(\w+) := (.*)$", makefile, re.MULTILINE))
    (line,) = re.findall(rf"-m tersor (.*--plot {re.escape(name)})$", makefile, re.MULTILINE)
    words = shlex.split(re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], line))
    assert MARKER.findall(README)[0][0] in words, "picture and table are of one file"
    monkeypatch.chdir(ROOT)
    again = tmp_path / "again.svg"
    assert main.run([*words[:-1], str(again)]) == 0
    assert described(ROOT / name) == described(again), f"draw it again: tersor {shlex.join(words)}"
    assert (ROOT / name).stat().st_size < 150_000


@pytest.fixture(scope="module")
def script() -> Any:
    """bench/readme_table.py as a module."""
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "bench" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_results_is_the_one_of_the_file(script: Any) -> None:
    tables = MARKER.findall(README)
    assert len(tables) == 3 and ROOT / tables[0][0] == script.RESULTS
    for name, shown in tables:
        results = ROOT / name
        assert shown.strip() == script.table(script.read(results), results.name)


def test_the_table_from_an_example(script: Any) -> None:
    """The generator itself, on numbers made up here."""
    times = {("cublas", "plain"): 40.0, ("fp8", "plain"): 20.0, ("fp6_e3m2", "pdl"): 16.0}
    rows = [
        {
            "oc": 8192,
            "ic": 8192,
            "n": n,
            "kernel": kernel,
            "chain": chain,
            "microseconds": time,
            "weight_bytes": 50 << 20,
        }
        for n in (2, 1)
        for (kernel, chain), time in times.items()
    ]
    environment = {"gpu": "NVIDIA H200", "torch": "2.11.0", "cuda": "13.0", "commit": "abc1234"}
    result = {"environment": environment, "read_bandwidth": 4.35e12, "rows": rows}
    text = script.table(result, "linear_h200.json")
    assert text.splitlines()[-1] == "| 8192 x 8192 | 1 | 16.0 | 40.0 | 20.0 | 2.50x | 12.1 |"
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 3
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "humming" not in text and "a8" not in text
    for word in ("NVIDIA H200", "4.35 TB/s", "abc1234", "linear_h200.json"):
        assert word in text


def test_the_table_of_experts_takes_the_faster_of_a_rivals_ways(script: Any) -> None:
    def row(kernel: str, way: str, time: float) -> dict[str, Any]:
        hit = {"experts_hit": 8.0, "hit_bytes": 4_000_000}
        return {"name": "olmoe", "n": 8, "kernel": kernel, "way": way, "microseconds": time, **hit}

    rows = [row("torch", "grouped_mm", 40.0), row("fp6_e3m2", "", 10.0), row("torch", "batched_mm", 25.0)]
    environment = {"gpu": "NVIDIA H200", "torch": "2.11.0", "cuda": "13.0", "commit": "abc1234"}
    result = {"kind": "tersor bench experts", "environment": environment, "read_bandwidth": 4e12, "rows": rows}
    text = script.table(result, "experts_h200.json")
    assert text.splitlines()[-1] == "| olmoe | 8 | 8 | 10.0 | 25.0 | 2.50x | 1.0 |" and "humming" not in text


def test_the_table_of_decode_steps_has_a_column_for_every_rival(script: Any) -> None:
    def row(format: str, batch: int, time: float, bytes: int | None) -> dict[str, Any]:
        facts = {"name": "llama-3-8b", "context": 512, "milliseconds": time}
        return {**facts, "format": format, "batch": batch, "weight_bytes": bytes, "kv_bytes": bytes}

    rows = [row("fp6_e3m2", 1, 1.5, 2 << 30), row("fp6_e3m2", 8, 2.0, 2 << 30), row("vllm 16bit", 8, 4.0, None)]
    environment = {"gpu": "NVIDIA H200", "torch": "2.11.0", "cuda": "13.0", "commit": "abc1234"}
    result = {"kind": "tersor bench latency", "environment": environment, "read_bandwidth": 4 * 2**40, "rows": rows}
    lines = script.table(result, "latency_h200.json").splitlines()
    assert lines[-2] == "| llama-3-8b | 512 | 1 | 1.50 | - | 667 | 0.98 |"
    assert lines[-1] == "| llama-3-8b | 512 | 8 | 2.00 | 4.00 | 4000 | 0.98 |"
