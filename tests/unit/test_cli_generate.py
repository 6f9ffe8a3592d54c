"""`tersor generate` from the command line: by the engine, and through transformers where that lacks the model."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import own_code, tiny_lm
from transformers import GPT2Config, GPT2LMHeadModel

import tersor
from tersor.cli.main import run
from tersor.integrations.transformers import load
from tersor.integrations.transformers.generate import stream

MODEL = str(tiny_lm.TINY)
PROMPT = "def read_file(path):\n"


@pytest.fixture
def engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no other model be loaded as one of transformers than the one that results are compared with."""
    tiny_lm.model()
    monkeypatch.setattr(load, "load_model", lambda *arguments, **options: pytest.fail("transformers ran the model"))


def by_transformers(count: int, prompt: str = PROMPT) -> list[int]:
    """Return the tokens that transformers' own `generate` draws."""
    ids = tiny_lm.tokenizer()(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = tiny_lm.model().generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def changed(folder: Path, name: str, **changes: Any) -> str:
    """Return a copy of the bundled model with changes in one of its JSON files."""
    model = tiny_lm.copy(folder / "changed")
    own_code.edit(model / name, changes)
    return str(model)


def result_of(words: list[str], capsys: pytest.CaptureFixture[str], prompt: str = PROMPT) -> dict[str, Any]:
    """Return what a command line with --json prints; nothing goes to stderr."""
    assert run(["generate", *words, "--prompt", prompt, "--device", "cpu", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found: dict[str, Any] = json.loads(captured.out)
    return found


def expected(**options: Any) -> str:
    return "".join(stream(tiny_lm.model(), tiny_lm.tokenizer(), PROMPT, **options))


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must fail with status 2 and one line, and return the line."""
    assert run(["generate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("tersor: ")
    return captured.err


def test_text_to_stdout_and_statistics_to_stderr(engine_alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", MODEL, "--prompt", PROMPT, "-n", "8", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out == tiny_lm.tokenizer().decode(by_transformers(8)) + "\n"
    line = r"8 prompt tokens in \d+\.\d{3} s; 8 new tokens at \d+\.\d tokens/s; ended by length\n"
    assert re.fullmatch(line, captured.err)


def test_text_comes_in_pieces_as_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "write", written.append)
    assert run(["generate", MODEL, "--prompt", PROMPT, "-n", "8", "--device", "cpu"]) == 0
    ids = by_transformers(8)
    assert "".join(written) == tiny_lm.tokenizer().decode(ids) + "\n" and len(written) >= len(ids)


def test_a_token_alone_has_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", MODEL, "--prompt", PROMPT, "-n", "1", "--device", "cpu"]) == 0
    assert "; 1 new tokens; ended by length\n" in capsys.readouterr().err


def test_the_models_own_options_hold_where_none_is_given(
    engine_alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = by_transformers(12)
    model = changed(tmp_path, "generation_config.json", max_new_tokens=9, temperature=0.7, eos_token_id=[1, ids[5]])
    ended = result_of([model], capsys)
    assert ended["tokens"] == ids[: ids.index(ids[5]) + 1] and ended["finish_reason"] == "eos"
    ignored = result_of([model, "--ignore-eos"], capsys)
    assert ignored["tokens"] == ids[:9] and ignored["finish_reason"] == "length"
    own_code.edit(Path(model) / "generation_config.json", {"do_sample": True})
    drawn = [result_of([model, "--ignore-eos", "--seed", seed], capsys)["tokens"] for seed in "1234"]
    assert len({tuple(row) for row in drawn}) > 1


def test_a_text_ends_where_the_context_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = changed(tmp_path, "config.json", max_position_embeddings=12)
    result = result_of([model, "-n", "20"], capsys)
    assert result["tokens"] == by_transformers(4)
    assert (result["prompt_tokens"], result["new_tokens"], result["finish_reason"]) == (8, 4, "context")


def test_a_stop_text_ends_the_text_and_is_no_part_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    whole = expected(max_new_tokens=24)
    stop = whole[17:23]
    result = result_of([MODEL, "-n", "24", "--stop", "zzzz", "--stop", stop], capsys)
    assert result["text"] == whole[: whole.index(stop)]
    assert result["finish_reason"] == "stop" and result["new_tokens"] == len(result["tokens"]) < 24


def test_the_prompt_as_a_turn_of_a_chat(engine_alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = changed(tmp_path, "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}!")
    result = result_of([model, "--chat", "-n", "6"], capsys, "import")
    assert result["tokens"] == by_transformers(6, "import!") and result["prompt"] == "import"


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
    params = tersor.SamplingParams(max_tokens=8, ignore_eos=True, **options)
    (output,) = tersor.LLM(MODEL, device="cpu", kv_bytes=1 << 22).generate(PROMPT, params)
    assert result["tokens"] == output.outputs[0].token_ids != by_transformers(8)
    assert result["text"] == output.outputs[0].text
    assert result["prompt"] == PROMPT and len(result["tokens"]) == result["new_tokens"] == 8
    assert result["finish_reason"] == "length" and result["cuda_graph"] is False
    assert result["eager_reason"] == "the model is on cpu" and result["device"] == "cpu"
    assert result["tokens_per_second"] == pytest.approx(7 / result["decode_seconds"])
    assert result["prefill_seconds"] > 0 and result["samples"] == 1 and result["capture_seconds"] == 0


def test_a_compressed_model_gives_what_it_gives_through_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = str(tmp_path / "packed")
    assert run(["quantize", MODEL, "-o", packed, "--format", "fp6_e3m2"]) == 0
    capsys.readouterr()
    mine = stream(load.load_model(packed, "cpu"), tiny_lm.tokenizer(), PROMPT, max_new_tokens=12)
    text = "".join(mine)
    result = result_of([packed, "-n", "12"], capsys)
    assert result["text"] == text and result["tokens"] == mine.tokens


def test_what_the_engine_does_not_have_runs_through_transformers_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GPT2Config(vocab_size=8192, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    target = tiny_lm.copy(tmp_path / "gpt2", "tokenizer.json", "tokenizer_config.json")
    model.save_pretrained(target)
    text = "".join(stream(model, tiny_lm.tokenizer(), PROMPT, max_new_tokens=4))
    words = ["generate", str(target), "--prompt", PROMPT, "-n", "4", "--device", "cpu"]
    said = "tersor: GPT2LMHeadModel runs through transformers: the engine does not have it\n"
    assert run(words) == 0
    captured = capsys.readouterr()
    assert captured.out == text + "\n" and captured.err.startswith(said + "8 prompt tokens in ")
    assert run([*words, "--samples", "2", "--json"]) == 0
    captured = capsys.readouterr()
    assert [row["text"] for row in json.loads(captured.out)["continuations"]] == [text] * 2
    alike, rest = captured.err.split("\n", 1)
    assert alike.startswith("tersor: the most probable token is always taken") and rest == said
    assert "32 positions" in refused([str(target), "--prompt", "x\n" * 32, "--device", "cpu"], capsys)


def test_what_the_engine_refuses_of_a_model_it_has_runs_through_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = changed(tmp_path, "config.json", hidden_act="gelu_new")
    assert run(["generate", model, "--prompt", PROMPT, "-n", "2", "--device", "cpu"]) == 0
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("tersor: LlamaForCausalLM runs through transformers: changed: ") and "hidden_act" in first
    assert len(rest) == 1


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
