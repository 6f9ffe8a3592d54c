"""`tersor eval` from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import own_code, tiny_lm

from tersor.cli.main import run

SHORT = ["--window", "64", "--max-tokens", "256", "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("def square(x):\n    return x * x\n\n" * 60, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tersor.convert import quantize

    output = tmp_path_factory.mktemp("packed") / "int4"
    quantize(tiny_lm.TINY, output, format="int4")
    return str(output)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """Run a command line that must fail with one line, and return the line."""
    assert run(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("tersor: ")
    return captured.err


def test_json_of_two_models_against_a_reference(text: str, packed: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(tiny_lm.TINY), packed, "--text", text, "--reference", str(tiny_lm.TINY), *SHORT]
    assert run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    original, compressed = result["models"]
    assert (original["windows"], original["window"], original["tokens"]) == (4, 64, 4 * 63)
    assert original["kl"] == 0 and original["bits_per_weight"] == 16
    assert compressed["kl"] > compressed["kl_error"] > 0
    assert compressed["reference_perplexity"] == original["perplexity"] != compressed["perplexity"]
    assert 4 < compressed["bits_per_weight"] < 4.1
    assert compressed["weight_bytes"] < original["weight_bytes"]


def test_a_table_and_a_picture(text: str, packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "out.png"
    arguments = ["eval", packed, "--text", text, "--reference", str(tiny_lm.TINY), *SHORT]
    pytest.importorskip("matplotlib")
    assert run([*arguments, "--plot", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "4 windows of 64 tokens" in table and "keys and values" not in table
    assert re.search(r"int4 +4\.05 +5\.6 MB +\d+\.\d{3} \+- \d", table)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_a_reference_there_is_no_comparison(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", str(tiny_lm.TINY), "--text", text, *SHORT]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "KL" not in out
    assert run(["eval", str(tiny_lm.TINY), "--text", text, *SHORT, "--json"]) == 0
    assert "kl" not in json.loads(capsys.readouterr().out)["models"][0]


def test_keys_and_values_in_fp8_are_compared_with_a_reference_that_keeps_them_as_they_are(
    text: str, packed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(tiny_lm.TINY), packed, "--text", text, "--reference", str(tiny_lm.TINY), *SHORT]
    found = {}
    for kept in ("auto", "fp8"):
        assert run([*arguments, "--kv-dtype", kept, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["kv_dtype"] == kept
        found[kept] = result["models"]
    (plain, weights), (pages, both) = found["auto"], found["fp8"]
    assert plain["kl"] == 0 and pages["kl"] > pages["kl_error"] > 0
    assert pages["reference_perplexity"] == both["reference_perplexity"] == plain["perplexity"] != pages["perplexity"]
    assert both["kl"] != weights["kl"] > pages["kl"]
    assert 4 < both["bits_per_weight"] < 4.1 and pages["bits_per_weight"] == 16
    assert run(["eval", str(tiny_lm.TINY), "--text", text, *SHORT, "--kv-dtype", "fp8"]) == 0
    table = capsys.readouterr().out
    assert f"{pages['perplexity']:.3f}" in table and "; keys and values: fp8\n" in table


def test_activations_of_a_model_that_is_its_own_reference_are_those_asked_for(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tersor.convert import quantize

    output = tmp_path / "fp6"
    quantize(tiny_lm.TINY, output, format="fp6_e3m2")
    arguments = ["eval", str(output), "--text", text, "--reference", str(output), *SHORT, "--json"]
    assert run([*arguments, "--activations", "fp8"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["kl"] > 0


def test_keys_and_values_of_a_model_that_the_engine_does_not_have_are_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_lm.copy(tmp_path / "model")
    arguments = ["eval", str(model), "--text", text, *SHORT, "--kv-dtype"]
    assert "kv_dtype 'fp9', did you mean 'fp8'?" in refused([*arguments, "fp9"], capsys)
    own_code.edit(model / "config.json", {"architectures": ["OtherForCausalLM"]})
    line = refused([*arguments, "fp8"], capsys, status=1)
    assert "model: kv_dtype asks for the engine, and OtherForCausalLM runs through transformers: " in line


def test_bad_input_is_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tersor.hardware.cuda_available", lambda: False)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    model = str(tiny_lm.TINY)
    assert "no such text file" in refused(["eval", model, "--text", str(tmp_path / "no.txt")], capsys)
    assert "is empty" in refused(["eval", model, "--text", str(empty)], capsys)
    assert "less than one window of 2000" in refused(["eval", model, "--text", text, "--window", "2000"], capsys)
    assert "max_tokens is 3" in refused(["eval", model, "--text", text, "--max-tokens", "3"], capsys)
    assert "no CUDA GPU" in refused(["eval", model, "--text", text, "--device", "cuda"], capsys)
    assert "unknown dtype" in refused(["eval", model, "--text", text, "--dtype", "fp8"], capsys)
    assert ".png" in refused(["eval", model, "--text", text, "--plot", "out.gif"], capsys)
    assert str(tmp_path / "no") in refused(["eval", str(tmp_path / "no"), "--text", text], capsys)
    assert str(tmp_path) in refused(["eval", str(tmp_path), "--text", text], capsys)
    assert str(tmp_path) in refused(["eval", model, "--reference", str(tmp_path), "--text", text], capsys)
    assert "--txt" in refused(["eval", model, "--txt", text], capsys)
    assert "--text" in refused(["eval", model], capsys)
    assert "--window" in refused(["eval", model, "--text", text, "--window", "x"], capsys)


def test_a_reference_with_another_tokenizer(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny_lm.copy(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:500]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    line = refused(["eval", str(other), "--reference", str(tiny_lm.TINY), "--text", text, *SHORT], capsys)
    assert "different tokens" in line
