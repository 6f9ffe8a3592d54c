"""`tersor generate` from the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import tiny_lm

from tersor.cli.main import run
from tersor.integrations.transformers.generate import stream

MODEL = str(tiny_lm.TINY)
PROMPT = "def read_file(path):\n"


def expected(**options) -> str:
    return "".join(stream(tiny_lm.model(), tiny_lm.tokenizer(), PROMPT, **options))


def refused(arguments, capsys) -> str:
    """Run a command line that must fail with status 2 and one line, and return the line."""
    assert run(["generate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("tersor: ")
    return captured.err


def test_text_to_stdout_and_statistics_to_stderr(capsys):
    assert run(["generate", MODEL, "--prompt", PROMPT, "-n", "8", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected(max_new_tokens=8) + "\n"
    assert captured.err.count("\n") == 1
    assert "8 prompt tokens in" in captured.err and "8 new tokens at" in captured.err


@pytest.mark.parametrize("arguments", [["--prompt", "-"], ["-"]])
def test_the_prompt_from_standard_input(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode()), encoding="ascii"))
    assert run(["generate", MODEL, *arguments, "-n", "8", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == expected(max_new_tokens=8) + "\n"


def test_json_and_sampling_options(capsys):
    words = ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01", "--seed", "3"]
    words += ["--repetition-penalty", "1.1", "--stop", "zzzz", "--stop", "yyyy", "--ignore-eos", "--json"]
    assert run(["generate", MODEL, PROMPT, "-n", "8", "--device", "cpu", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 3, "repetition_penalty": 1.1}
    assert result["text"] == expected(max_new_tokens=8, ignore_eos=True, **options) != expected(max_new_tokens=8)
    assert result["prompt"] == PROMPT and len(result["tokens"]) == result["new_tokens"] == 8
    assert result["finish_reason"] == "length" and result["cuda_graph"] is False


def test_joined_layers_give_the_same_text(tmp_path, capsys):
    packed = str(tmp_path / "packed")
    assert run(["quantize", MODEL, "-o", packed, "--format", "fp6_e3m2"]) == 0
    texts = []
    for words in ([], ["--fuse"]):
        capsys.readouterr()
        assert run(["generate", packed, PROMPT, "-n", "12", "--device", "cpu", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "\n"
    assert "no packed layers that can be joined" in refused([MODEL, PROMPT, "--device", "cpu", "--fuse"], capsys)


def test_bad_input_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("tersor.hardware.cuda_available", lambda: False)
    assert "no prompt" in refused([MODEL], capsys)
    assert "two prompts" in refused([MODEL, "a", "--prompt", "b"], capsys)
    assert "no chat template" in refused([MODEL, "a", "--chat"], capsys)
    assert "no CUDA GPU" in refused([MODEL, "a", "--device", "cuda"], capsys)
    assert "top_p is 2.0" in refused([MODEL, "a", "--top-p", "2"], capsys)
    assert "did you mean 'on'" in refused([MODEL, "a", "--cuda-graph", "onn"], capsys)
    assert "2048 positions" in refused([MODEL, "x\n" * 2048], capsys)
    assert str(tmp_path) in refused([str(tmp_path), "a"], capsys)
    assert "--topk" in refused([MODEL, "a", "--topk", "3"], capsys)
    assert "--seed" in refused([MODEL, "a", "--seed", "x"], capsys)
    assert "'model'" in refused([], capsys)


def test_a_prompt_that_is_not_utf_8(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "not UTF-8 text: byte 0xe9 at 3" in refused([MODEL, "-"], capsys)


def test_a_cuda_graph_asked_for_on_a_cpu_is_a_failure(capsys):
    assert run(["generate", MODEL, "a", "--device", "cpu", "--cuda-graph", "on"]) == 1
    assert "no CUDA graph for this model: the model is on cpu" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    command = [sys.executable, "-m", "tersor", "generate", MODEL, PROMPT, "-n", "60", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
