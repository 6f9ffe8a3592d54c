"""Several continuations of one prompt at once: equal where greedy, different and repeatable where drawn."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import pytest
import torch
from helpers import tiny_lm

from tersor import LLM, SamplingParams
from tersor.cli.main import run
from tersor.engine import Continuation, Sampling
from tersor.errors import InputError, TersorError
from tersor.integrations.transformers import decode
from tersor.integrations.transformers.generate import Generator

PROMPT = "def read_file(path):\n"
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, seed=3, repetition_penalty=1.1)


def generator() -> Generator:
    return Generator(tiny_lm.model(), tiny_lm.tokenizer())


def tokens(rows: list[Continuation]) -> list[list[int]]:
    return [row.tokens for row in rows]


def single(options: Sampling) -> Any:
    stream = generator().stream(PROMPT, options)
    return "".join(stream), stream


@pytest.mark.parametrize("penalty", [None, 1.3])
@pytest.mark.parametrize("static", [False, True])
def test_greedy_samples_are_the_single_stream(static: bool, penalty: float | None, monkeypatch: Any) -> None:
    options = Sampling(max_new_tokens=16, repetition_penalty=penalty)
    text, stream = single(options)
    monkeypatch.setattr(decode, "_wants_static", lambda device: static)
    several = generator()
    for _ in range(2):  # the second time uses the cache of the first again
        rows, numbers = several.samples(PROMPT, 3, options)
        assert tokens(rows) == [stream.tokens] * 3 and {row.text for row in rows} == {text}
        assert (numbers.samples, numbers.new_tokens, numbers.finish_reason) == (3, 48, "length")
    assert several._decoder.static == static


def test_a_seed_repeats_samples_which_differ() -> None:
    first, again = (tokens(generator().samples(PROMPT, 4, DRAWN)[0]) for _ in range(2))
    assert first == again and len({tuple(row) for row in first}) == 4


def test_one_sample_is_the_stream_of_the_same_seed() -> None:
    rows, numbers = generator().samples(PROMPT, 1, DRAWN)
    text, stream = single(DRAWN)
    assert rows[0].text == text and rows[0].tokens == stream.tokens and numbers.samples == 1


def test_the_prompt_is_read_once_and_by_every_row_where_its_cache_cannot_be_repeated(monkeypatch: Any) -> None:
    model, rows = copy.copy(tiny_lm.model()), []
    original = tiny_lm.model().forward
    name = "cache" if "cache" in inspect.signature(original).parameters else "past_key_values"

    def forward(*, input_ids: torch.Tensor, **options: Any) -> Any:
        rows.append(tuple(input_ids.shape))
        return original(input_ids=input_ids, **options)

    model.forward = forward
    length = len(tiny_lm.tokenizer()(PROMPT)["input_ids"])
    options = Sampling(max_new_tokens=2).resolved(model.generation_config)
    for repeatable in (True, False):
        monkeypatch.setattr(decode, "_repeatable", lambda cache, answer=repeatable: answer)
        decoder = decode.Decoder(model, options, 32, samples=3)
        decoder._cache_name, decoder._prefill_options = name, {}
        decoder.prefill([5] * length, None)
        decoder.step()
        assert len(set(decoder.fetch(decoder.publish()))) == 1
    assert rows == [(1, length), (3, 1), (3, length), (3, 1)]


def test_rows_end_one_by_one() -> None:
    whole = tokens(generator().samples(PROMPT, 4, DRAWN)[0])
    eos = whole[1][4]
    first = [row.index(eos) + 1 if eos in row else 12 for row in whole]
    model = copy.copy(tiny_lm.model())
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.update(eos_token_id=eos)
    rows, numbers = Generator(model, tiny_lm.tokenizer()).samples(PROMPT, 4, DRAWN)
    assert [len(row) for row in tokens(rows)] == first and len(set(first)) > 1
    assert tokens(rows) == [row[:count] for row, count in zip(whole, first, strict=True)]
    assert numbers.new_tokens == sum(first) and numbers.finish_reason == "eos, length"
    assert rows[1].finish_reason == "eos" and "length" in {row.finish_reason for row in rows}


def test_steps_end_with_the_last_row() -> None:
    text, _ = single(Sampling(max_new_tokens=16))
    several = generator()
    rows, numbers = several.samples(PROMPT, 2, Sampling(max_new_tokens=500, stop=(text[8:14],)))
    assert {row.text for row in rows} == {text[: text.index(text[8:14])]}
    assert numbers.finish_reason == "stop" and numbers.new_tokens < 32


def test_logits_that_are_not_finite_in_one_row_end_all() -> None:
    model = copy.deepcopy(tiny_lm.model())

    def spoil(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[0] == 1:
            return output
        return torch.cat([output[:1], torch.full_like(output[1:], torch.nan)])

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(TersorError, match="new token 2 cannot be drawn"):
        Generator(model, tiny_lm.tokenizer()).samples(PROMPT, 2, Sampling(max_new_tokens=4))


def test_fewer_than_one_sample_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="samples is 0: it must be at least 1"):
        generator().samples(PROMPT, 0)
    assert run(["generate", str(tiny_lm.TINY), "--prompt", "a", "--samples", "0"]) == 2
    assert "samples is 0" in capsys.readouterr().err


def test_the_verb_numbers_texts_and_lists_them_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(tiny_lm.TINY), "--prompt", PROMPT, "-n", "6", "--device", "cpu", "--samples", "2"]
    words += ["--temperature", "1", "--seed", "3"]
    params = SamplingParams(n=2, max_tokens=6, temperature=1.0, seed=3)
    rows = LLM(tiny_lm.TINY, device="cpu", kv_bytes=1 << 22).generate(PROMPT, params)[0].outputs
    assert run(words) == 0
    captured = capsys.readouterr()
    assert captured.out == f"[1/2]\n{rows[0].text}\n[2/2]\n{rows[1].text}\n"
    assert "12 new tokens in 2 samples at" in captured.err and captured.err.count("\n") == 1
    assert run([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["continuations"] == [
        {"text": row.text, "tokens": row.token_ids, "finish_reason": "length"} for row in rows
    ]
    assert (result["samples"], result["new_tokens"], result["finish_reason"]) == (2, 12, "length")
    assert result["tokens_per_second"] == pytest.approx(10 / result["decode_seconds"])


@pytest.mark.parametrize("more", [["--samples", "2"], ["--seed", "3"]])
def test_greedy_samples_or_a_seed_of_them_are_a_line_that_names_the_temperature(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(tiny_lm.TINY), "--prompt", PROMPT, "-n", "2", "--device", "cpu", *more]
    assert run(words) == 0
    assert "samples are alike and a seed changes nothing: add --temperature 1\n" in capsys.readouterr().err
    assert run([*words, "--temperature", "1"]) == 0
    assert "--temperature" not in capsys.readouterr().err
