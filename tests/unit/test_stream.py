"""engine/stream.py: tokens become text, and a stop ends it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from helpers import tiny_lm

from tersor.engine.continuation import prompt_tokens
from tersor.engine.outputs import LENGTH, STOP, Logprob
from tersor.engine.params import SamplingParams
from tersor.engine.stream import Stream
from tersor.errors import InputError

TOKENIZER = tiny_lm.tokenizer()
TEXT = "def read(path): return path.read_text()"
TOKENS = TOKENIZER.encode(TEXT, add_special_tokens=False)


def run(params: SamplingParams, tokens: list[int] = TOKENS, eos: tuple[int, ...] = ()) -> Stream:
    stream = Stream(TOKENIZER, [], params, eos)
    for token in tokens:
        if stream.push(token):
            return stream
    stream.finish(LENGTH)
    return stream


def test_all_tokens_are_the_text() -> None:
    output = run(SamplingParams()).output
    assert (output.text, output.token_ids, output.finish_reason) == (TEXT, TOKENS, LENGTH)
    assert output.logprobs is None and output.cumulative_logprob is None and output.stop_reason is None


@pytest.mark.parametrize(("include", "text"), [(False, "def read(path): "), (True, "def read(path): return")])
def test_a_stop_text_over_several_tokens_ends_it_and_is_kept_where_asked_for(include: bool, text: str) -> None:
    params = SamplingParams(stop=["nowhere", "return"], include_stop_str_in_output=include)
    output = run(params).output
    assert (output.text, output.finish_reason, output.stop_reason) == (text, STOP, "return")
    assert TOKENIZER.decode(output.token_ids).endswith("return")


def test_what_may_begin_a_stop_text_is_held_back_until_it_is_none() -> None:
    stream = Stream(TOKENIZER, [], SamplingParams(stop=["path.write"]), ())
    shown = []
    for token in TOKENS:
        stream.push(token)
        shown.append(stream.output.text)
    stream.finish(LENGTH)
    assert stream.output.text == TEXT
    assert all(TEXT.startswith(text) and not text.endswith(("path.", "return path")) for text in shown)


def test_the_models_end_is_no_part_of_the_text_and_needs_no_reason() -> None:
    end = TOKENS[4]
    output = run(SamplingParams(), eos=(end,)).output
    assert output.token_ids == TOKENS[: TOKENS.index(end) + 1]
    assert (output.text, output.stop_reason) == (TOKENIZER.decode(TOKENS[: TOKENS.index(end)]), None)
    assert run(SamplingParams(ignore_eos=True), eos=(end,)).output.text == TEXT


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_names_itself(include: bool) -> None:
    stop = TOKENS[3]
    params = SamplingParams(stop_token_ids=[stop], include_stop_str_in_output=include)
    output = run(params).output
    until = TOKENS.index(stop) + include
    assert (output.text, output.finish_reason, output.stop_reason) == (TOKENIZER.decode(TOKENS[:until]), STOP, stop)


def test_log_probabilities_add_up() -> None:
    stream = Stream(None, [], SamplingParams(logprobs=0), ())
    for token in (3, 4):
        stream.push(token, {token: Logprob(-0.5, 1, "x")})
    assert stream.output.cumulative_logprob == -1.0 and stream.output.logprobs is not None
    assert [list(one) for one in stream.output.logprobs] == [[3], [4]] and stream.output.text == ""


def test_half_a_character_waits_for_the_other_half() -> None:
    tokens = TOKENIZER.encode("caf\u00e9 \u4f60", add_special_tokens=False)
    stream = Stream(TOKENIZER, [], SamplingParams(), ())
    for token in tokens:
        stream.push(token)
        assert "\ufffd" not in stream.output.text
    assert stream.output.text == "caf\u00e9 \u4f60"
    cut = run(SamplingParams(), tokens[:-1]).output.text
    assert cut.startswith("caf\u00e9") and cut != "caf\u00e9 \u4f60"


@pytest.mark.parametrize(
    "options", [{}, {"stop_token_ids": [TOKENS[5]]}, {"stop": ["return"]}, {"skip_special_tokens": False}]
)
def test_a_text_that_comes_late_is_the_same(options: dict[str, Any]) -> None:
    tokens = [*TOKENS, *TOKENIZER.encode("caf\u00e9 \u4f60", add_special_tokens=False)]
    for cut in (*range(1, len(TOKENS), 3), len(tokens) - 1, len(tokens)):
        soon, late = (Stream(TOKENIZER, TOKENS[:4], SamplingParams(**options), (0,)) for _ in range(2))
        for token in tokens[:cut]:
            ends = soon.push(token)
            assert late.push(token, late=True) == ends
            if ends:
                break
        for stream in (soon, late):
            stream.finish(LENGTH)
        assert late.output == soon.output


def test_tokens_whose_text_may_wait_are_decoded_once() -> None:
    decoded: list[list[int]] = []
    stream = Stream(SimpleNamespace(decode=lambda ids, **_: decoded.append(ids) or ""), [], SamplingParams(), ())  # type: ignore[arg-type]
    for token in TOKENS:
        assert not stream.push(token, late=True)
    assert not decoded
    stream.finish(LENGTH)
    assert decoded == [[], TOKENS]


@pytest.mark.parametrize("token", [-3, 300])
def test_a_prompt_of_another_tokenizer_is_refused_with_the_token_that_is_none(token: int) -> None:
    with pytest.raises(InputError, match=f"^the prompt holds token {token}, the model has 300: another tokenizer"):
        prompt_tokens(TOKENIZER, [5, token, 7], 300)
