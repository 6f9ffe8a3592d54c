"""`tersor eval` from the command line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import own_code, tiny_lm

from tersor.cli import console
from tersor.cli.main import run
from tersor.errors import TersorError

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


def with_other_tokens(target: Path) -> Path:
    """Copy the tiny model, with a tokenizer that splits texts otherwise."""
    other = tiny_lm.copy(target)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:500]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return other


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
    assert original["kl"] == original["flips"] == 0 and original["bits_per_weight"] == 16
    assert compressed["kl_p99"] > compressed["kl"] and compressed["kl_median"] > 0 and compressed["flips"] > 0
    assert (result["kind"], result["version"], result["activations"]) == ("tersor eval", 1, "16bit")
    assert "commit" in result["environment"]
    assert original["windows_sha256"] == compressed["windows_sha256"] == result["reference_model"]["windows_sha256"]
    assert result["reference_model"]["perplexity"] == original["perplexity"]
    assert all(len(values) == 4 for values in compressed["per_window"].values()) and "kl" in compressed["per_window"]
    floor = result["noise_floor"]
    assert floor["rounding"] == "inputs of products in bfloat16" and 0 < floor["kl"] < compressed["kl"] / 100
    (difference,) = result["comparisons"]
    assert (difference["first"], difference["other"], difference["windows"]) == ("tiny-lm", "int4", 4)
    assert difference["models"] == [0, 1]
    assert difference["kl_difference"] == compressed["kl"] and difference["kl_better"] == 4
    assert difference["log_perplexity_difference"] == pytest.approx(math.log(compressed["perplexity_ratio"]))
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
    assert "4 windows of 64 tokens" in table and "keys and values" not in table and "against" not in table
    assert re.search(r"^ *tiny-lm +16\.00 +\S+ MB +\d+\.\d{3} \+- \d+\.\d{3} *$", table, re.MULTILINE), "the reference"
    assert re.search(r"^ *noise floor +\d+\.\d{3} .* \+- ", table, re.MULTILINE)
    assert "noise floor: the reference with inputs of products in bfloat16;" in table
    assert re.search(r"int4 +4\.05 +5\.6 MB +\d+\.\d{3} \+- \d", table)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_table_holds_models_that_run_in_different_ways_and_another_compares_them(
    text: str, packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All run in the engine where one asks for it, so the one that keeps its pages is its reference to the last bit."""
    tiny, output = str(tiny_lm.TINY), tmp_path / "out.json"
    models = [packed, tiny, f"{tiny}@kv-dtype=fp8", f"{packed}@kv-dtype=fp8"]
    options = ["--reference", tiny, "--text", text, *SHORT, "--no-noise-floor", "-o", str(output)]
    assert run(["eval", *models, *options]) == 0
    result = json.loads(output.read_text())
    weights, plain, pages, both = result["models"]
    assert plain["kl"] == 0 < pages["kl"] < weights["kl"] != both["kl"]
    assert [one["kv_dtype"] for one in result["models"]] == [None, None, "fp8", "fp8"]
    assert [one["label"] for one in result["models"]][2:] == ["tiny-lm@kv-dtype=fp8", "int4@kv-dtype=fp8"]
    assert len(result["comparisons"]) == 6 and "noise_floor" not in result
    table, differences = capsys.readouterr().out.split("against int4")
    assert "noise floor" not in table and len(re.findall(r"^ *tiny-lm ", table, re.MULTILINE)) == 1
    assert re.search(r"^ *tiny-lm +-\d\S+ \+- \S+ +\d of 4 +-\d\S+ \+- \S+ +0 of 4 *$", differences, re.MULTILINE)
    assert re.search(r"^ *tiny-lm@kv-dtype=fp8 .* 0 of 4 *$", differences, re.MULTILINE)


def test_the_noise_floor_of_a_model_served_in_16_bits_is_its_distance_to_float32(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = str(tiny_lm.TINY)
    arguments = ["eval", tiny, "--reference", tiny, "--text", text, *SHORT, "--dtype", "bfloat16", "--json"]
    assert run(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    floor, (model,) = result["noise_floor"], result["models"]
    assert model["kl"] == 0 and floor["rounding"] == "float32 in place of bfloat16" and floor["kl"] > 1e-6
    assert run(["eval", tiny, "--text", text, *SHORT, "--json"]) == 0
    (wide,) = json.loads(capsys.readouterr().out)["models"]
    assert floor["perplexity"] == pytest.approx(wide["perplexity"], rel=1e-6), "it is the model in float32"


def test_a_noise_floor_without_memory_for_it_says_how_to_do_without(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tersor.integrations.transformers import load

    ready = load.ready_model

    def starving(path: Path, device: torch.device, dtype: str, **options: Any) -> Any:
        if dtype == "float32":
            raise TersorError("tiny: the model does not fit in the memory of cuda:0")
        return ready(path, device, dtype, **options)

    monkeypatch.setattr(load, "ready_model", starving)
    tiny = str(tiny_lm.TINY)
    line = refused(["eval", tiny, "--reference", tiny, "--text", text, *SHORT, "--dtype", "float16"], capsys, status=1)
    assert "the noise floor needs the reference in float32 as well: " in line and "--no-noise-floor" in line


def test_models_that_read_other_tokens_are_not_compared_with_each_other(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_other_tokens(tmp_path / "other")
    assert run(["eval", str(tiny_lm.TINY), str(other), "--text", text, *SHORT]) == 0
    shown = capsys.readouterr().out
    assert "other reads other tokens than tiny-lm, and is not compared with it" in shown and "against" not in shown


def test_numbers_show_the_digits_that_their_errors_leave_them() -> None:
    assert console.measured(24.4512, 0.9312) == "24.45 +- 0.93"
    assert console.measured(0.011384, 0.00042) == "0.01138 +- 0.00042"
    assert (
        console.measured(-1234.5, 321.0) == "-1234 +- 321"
        and console.measured(2.214, 0.19, sign=True) == "+2.21 +- 0.19"
    )
    assert console.measured(0.0, 0.0, sign=True) == "0 +- 0" and console.measured(None) == "-"
    assert console.measured(0.0123456) == "0.01235" and console.measured(348.123, None) == "348.1"


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
    assert "give --text FILE, a text to predict, or --tasks TASK" in refused(["eval", model], capsys)
    assert "--reference is of a text" in refused(["eval", model, "--tasks", "x", "--reference", model], capsys)
    assert "--limit is of tasks" in refused(["eval", model, "--text", text, "--limit", "3"], capsys)
    assert "did you mean 'kv-dtype'" in refused(["eval", f"{model}@kv-type=fp8", "--text", text], capsys)
    assert "does not exist" in refused(["eval", model, "--text", text, "-o", str(tmp_path / "no" / "x")], capsys)
    assert "--window" in refused(["eval", model, "--text", text, "--window", "x"], capsys)


def test_a_reference_with_another_tokenizer(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = with_other_tokens(tmp_path / "other")
    line = refused(["eval", str(other), "--reference", str(tiny_lm.TINY), "--text", text, *SHORT], capsys)
    assert "different tokens" in line
