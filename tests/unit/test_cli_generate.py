"""`tersor generate` from the command line."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_lm

from tersor.cli.main import run
from tersor.integrations.transformers.generate import stream

MODEL = str(tiny_lm.TINY)
PROMPT = "def read_file(path):\n"


def expected(**options: Any) -> str:
    return "".join(stream(tiny_lm.model(), tiny_lm.tokenizer(), PROMPT, **options))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must fail with status 2 and one line, and return the line."""
    assert run(["generate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("tersor: ")
    return captured.err


def test_text_to_stdout_and_statistics_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", MODEL, "--prompt", PROMPT, "-n", "8", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected(max_new_tokens=8) + "\n"
    assert captured.err.count("\n") == 1
    assert "8 prompt tokens in" in captured.err and "8 new tokens at" in captured.err


def test_the_prompt_from_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode()), encoding="ascii"))
    assert run(["generate", MODEL, "--prompt", "-", "-n", "8", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == expected(max_new_tokens=8) + "\n"


def test_json_and_sampling_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01", "--seed", "3"]
    words += ["--repetition-penalty", "1.1", "--stop", "zzzz", "--stop", "yyyy", "--ignore-eos", "--json"]
    assert run(["generate", MODEL, "--prompt", PROMPT, "-n", "8", "--device", "cpu", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 3, "repetition_penalty": 1.1}
    assert result["text"] == expected(max_new_tokens=8, ignore_eos=True, **options) != expected(max_new_tokens=8)
    assert result["prompt"] == PROMPT and len(result["tokens"]) == result["new_tokens"] == 8
    assert result["finish_reason"] == "length" and result["cuda_graph"] is False


def test_joined_layers_give_the_same_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = str(tmp_path / "packed")
    assert run(["quantize", MODEL, "-o", packed, "--format", "fp6_e3m2"]) == 0
    texts = []
    for words in ([], ["--fuse"]):
        capsys.readouterr()
        assert run(["generate", packed, "--prompt", PROMPT, "-n", "12", "--device", "cpu", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "\n"
    assert "no packed layers that can be joined" in refused(
        [MODEL, "--prompt", PROMPT, "--device", "cpu", "--fuse"], capsys
    )


def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tersor.hardware.cuda_available", lambda: False)
    assert "Missing option '--prompt'" in refused([MODEL], capsys)
    assert "unexpected extra argument" in refused([MODEL, "a", "--prompt", "b"], capsys)
    assert "no chat template" in refused([MODEL, "--prompt", "a", "--chat"], capsys)
    assert "no CUDA GPU" in refused([MODEL, "--prompt", "a", "--device", "cuda"], capsys)
    assert "top_p is 2.0" in refused([MODEL, "--prompt", "a", "--top-p", "2"], capsys)
    assert "did you mean 'on'" in refused([MODEL, "--prompt", "a", "--cuda-graph", "onn"], capsys)
    assert "2048 positions" in refused([MODEL, "--prompt", "x\n" * 2048], capsys)
    assert str(tmp_path) in refused([str(tmp_path), "--prompt", "a"], capsys)
    assert "--topk" in refused([MODEL, "--prompt", "a", "--topk", "3"], capsys)
    assert "--seed" in refused([MODEL, "--prompt", "a", "--seed", "x"], capsys)
    assert "'model'" in refused([], capsys)


def test_a_prompt_that_is_not_utf_8(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "not UTF-8 text: byte 0xe9 at 3" in refused([MODEL, "--prompt", "-"], capsys)


def test_a_cuda_graph_asked_for_on_a_cpu_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", MODEL, "--prompt", "a", "--device", "cpu", "--cuda-graph", "on"]) == 1
    assert "no CUDA graph for this model: the model is on cpu" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of a pipe is closed after the first piece; what Python does at exit is in test_cli_main.py."""
    read, write = os.pipe()

    class Output(io.TextIOWrapper):
        pieces = 0

        def write(self, text: str) -> int:
            self.pieces += 1
            if self.pieces == 2:
                os.close(read)
            return super().write(text)

    with Output(os.fdopen(write, "wb")) as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert run(["generate", MODEL, "--prompt", PROMPT, "-n", "60", "--device", "cpu"]) == 0
        monkeypatch.undo()
        assert output.pieces == 2
        assert os.path.samestat(os.fstat(output.fileno()), os.stat(os.devnull))
    assert capsys.readouterr() == ("", "")
