"""What is a request of a batch file, and what is not: every bad line has its number and a reason."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import batches

from tersor.engine.batch_lines import BatchInput, read_batch
from tersor.engine.openai_body import CHAT, COMPLETIONS, parse
from tersor.engine.params import SamplingParams
from tersor.errors import InputError


class Letters(batches.Letters):
    """A model of bytes, whose template wants a user's message last."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def chat(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> Sequence[int]:
        self.options.append(dict(options))
        if messages[-1]["role"] != "user":
            raise InputError("the template says:\nthe last message must be a user's")
        return [2, *"".join(message["content"] or "" for message in messages).encode(), 3]


def batch_of(folder: Path, *lines: Any, **options: Any) -> BatchInput:
    """Read a file of these lines."""
    path = folder / "in.jsonl"
    rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(rows))
    return read_batch(path, Letters(), **options)


def ask(name: Any = "a", url: str = COMPLETIONS, method: str = "POST", **body: Any) -> dict[str, Any]:
    """A line."""
    return {"custom_id": name, "method": method, "url": url, "body": body or {"prompt": "hello"}}


GOOD = ask("good", prompt="hello")


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (b"nonsense", "invalid_json", "the line is not JSON"),
        (b'{"custom_id": "x"', "invalid_json", "the line is not JSON"),
        (b"[" * 100_000, "invalid_json", "the line is not JSON"),
        (b'{"custom_id": NaN}', "invalid_json", "NaN is no number"),
        (b'{"custom_id": "\xff"}', "invalid_json", "not UTF-8"),
        (b'{"custom_id": "\\ud800"}', "invalid_json", "half of a surrogate pair"),
        (b"[1]", "invalid_json", "no object"),
        ({"method": "POST"}, "invalid_custom_id", "custom_id is missing"),
        (ask(7), "invalid_custom_id", "custom_id is missing, empty or no text"),
        (ask(""), "invalid_custom_id", "custom_id is missing, empty or no text"),
        (ask("good"), "duplicate_custom_id", "custom_id 'good' is that of line 1, too"),
        (ask(method="GET"), "invalid_method", "method is 'GET', expected 'POST'"),
        (ask(url="/v1/completion"), "invalid_url", "did you mean '/v1/completions'"),
        (ask(url="/v1/embeddings", input=["a", ""]), "invalid_request", "input is empty"),
        (ask(url="/v1/embeddings", input="a", dimensions=2), "invalid_request", "dimensions is not supported"),
        (ask(url="/v1/embeddings", input="a", encoding_format="f4"), "invalid_request", "expected float or base64"),
        (ask(url="/v1/embeddings", input=[[256]]), "invalid_request", "token 256 is none of the model's, 0 to 255"),
        (ask(url="/v1/embeddings", input="a" * 65), "context_length_exceeded", "the prompt has 65 tokens, and"),
        ({**ask(), "body": 3}, "invalid_request", "body is a number, expected an object"),
        ({**ask(), "body": {}}, "invalid_request", "body has no prompt"),
        (ask(prompt="a", user="nobody"), "invalid_request", "nobody asks"),
        (ask(prompt=""), "invalid_request", "prompt is empty"),
        (ask(prompt=[]), "invalid_request", "prompt is empty"),
        (ask(prompt=["a", ""]), "invalid_request", "prompt is empty"),
        (ask(prompt=[1, 2.5]), "invalid_request", "prompt holds a list"),
        (ask(prompt={"a": 1}), "invalid_request", "prompt holds an object"),
        (ask(prompt=[1, 256]), "invalid_request", "token 256 is none of the model's, 0 to 255"),
        (ask(prompt="a", stream=True), "invalid_request", "stream is not supported"),
        (ask(prompt="a", echo=True), "invalid_request", "echo is not supported"),
        (ask(prompt="a", temprature=1), "invalid_request", "'temprature' that is not known here, did you mean"),
        (ask(prompt="a", temperature="hot"), "invalid_request", "temperature is a text (hot), expected a number"),
        (ask(prompt="a", temperature=-1), "invalid_request", "temperature is -1"),
        (ask(prompt="a", n=True), "invalid_request", "n is a boolean, expected a whole number"),
        (ask(prompt="a", max_tokens=2.0), "invalid_request", "max_tokens is a number (2.0), expected a whole"),
        (ask(prompt="a", logit_bias={"x": 1}), "invalid_request", "logit_bias names a token 'x'"),
        (ask(prompt="a", logit_bias={"9" * 5000: 1}), "invalid_request", "logit_bias names a token '999"),
        (ask(prompt="a", logit_bias={"1": 10**400}), "invalid_request", "it must be finite in float32 for every token"),
        (ask(prompt="a", temperature=10**400), "invalid_request", "it must be at least 0 (0 is greedy), and finite"),
        (ask(prompt="a", stop=["a", 1]), "invalid_request", "stop is a list, expected a text or a list of texts"),
        (ask(prompt="a", response_format={"type": "xml"}), "invalid_request", "response_format has type 'xml'"),
        (ask(prompt="a" * 65), "context_length_exceeded", "the prompt has 65 tokens and up to 1 are to be drawn"),
        (
            ask(prompt="a" * 60, max_tokens=5),
            "context_length_exceeded",
            "60 tokens and up to 5 are to be drawn",
        ),
        (ask(prompt="a", model="gpt"), "model_not_found", "model is 'gpt', and this batch runs letters"),
    ],
)
def test_a_bad_line_is_kept_with_its_number_and_reason_and_stops_no_other(
    tmp_path: Path, line: Any, code: str, message: str
) -> None:
    batch = batch_of(tmp_path, GOOD, line, ask("other"), models=["letters"])
    assert [one.custom_id for one in batch.lines] == ["good", "other"]
    (bad,) = batch.bad
    assert (bad.number, bad.code) == (2, code)
    assert message in bad.message
    assert "\n" not in bad.message


def test_the_reason_of_a_template_is_one_line(tmp_path: Path) -> None:
    batch = batch_of(
        tmp_path,
        ask("a", CHAT, messages=[{"role": "system", "content": "x"}]),
        ask("b", CHAT, messages=[]),
        ask("c", CHAT, messages=["hi"]),
        ask("d", CHAT, messages=[{"content": "hi"}]),
        ask("e", CHAT, messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        ask("f", CHAT, messages=[{"role": "user", "content": 3}]),
        ask("g", CHAT, messages=[{"role": "user", "content": "x"}], top_logprobs=2),
    )
    assert not batch.lines
    assert [bad.message for bad in batch.bad] == [
        "the template says: the last message must be a user's",
        "messages is empty",
        "messages[0] is a text, expected an object",
        "messages[0] has no role",
        "messages[0] has a part of type 'image_url': only text is read",
        "messages[0] has a content that is a number, expected a text or a list of parts",
        "top_logprobs is given without logprobs: true",
    ]


def test_a_file_as_editors_on_any_system_write_it_is_read(tmp_path: Path) -> None:
    first, second = (json.dumps(ask(name)).encode() for name in "ab")
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + first + b"\r\n\r\n  \n" + second)
    batch = read_batch(path, Letters())
    assert [(line.number, line.custom_id) for line in batch.lines] == [(1, "a"), (4, "b")]
    assert not batch.bad


def test_fields_of_a_body_become_sampling(tmp_path: Path) -> None:
    body = {
        "model": "letters",
        "prompt": [[1, 2], [3]],
        "n": 2,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "stop": "x",
        "seed": 3,
        "logit_bias": {"5": -100},
        "logprobs": 2,
        "user": "me",
        "stream": False,
        "min_p": None,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    }
    (line,) = batch_of(tmp_path, ask("a", **body)).lines
    assert [prompt.tolist() for prompt in line.prompts] == [[1, 2], [3]]
    assert (
        line.params
        == [
            SamplingParams(
                n=2,
                max_tokens=7,
                temperature=0.5,
                top_p=0.9,
                top_k=4,
                stop=("x",),
                seed=3,
                logit_bias={5: -100.0},
                logprobs=2,
                grammar={"json_schema": {"type": "object"}},
            )
        ]
        * 2
    )


def test_a_chat_has_options_for_its_template(tmp_path: Path) -> None:
    tools = [{"type": "function"}]
    asked = parse(
        CHAT,
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "max_tokens": 3,
            "max_completion_tokens": 5,
            "logprobs": True,
            "top_logprobs": 4,
            "tools": tools,
            "chat_template_kwargs": {"enable_thinking": False},
            "response_format": {"type": "json_object"},
        },
    )
    assert asked.messages == [{"role": "user", "content": "ab"}]
    assert asked.options == {"tools": tools, "enable_thinking": False}
    assert asked.params is not None
    assert (asked.params.max_tokens, asked.params.logprobs) == (5, 4)
    assert asked.params.grammar == {"json_object": True}


def test_a_request_without_a_seed_draws_by_its_name(tmp_path: Path) -> None:
    lines = [ask("a"), ask("b"), ask("c", prompt=["x", "y"]), ask("d", prompt="x", temperature=0)]
    first = {one.custom_id: one for one in batch_of(tmp_path, *lines).lines}
    again = {one.custom_id: one for one in batch_of(tmp_path, *lines[::-1]).lines}
    assert {name: line.params for name, line in first.items()} == {name: line.params for name, line in again.items()}
    seeds = [params.seed for name in "abc" for params in first[name].params if params]
    assert len({*seeds}) == 4
    assert all(isinstance(seed, int) for seed in seeds)
    assert first["d"].params[0] is not None
    assert first["d"].params[0].seed is None  # greedy: equal prompts have one answer


def test_a_request_has_the_defaults_that_it_does_not_give(tmp_path: Path) -> None:
    defaults = {"temperature": 0.5, "max_tokens": 9, "top_k": 3}
    lines = batch_of(tmp_path, ask("a"), ask("b", prompt="x", max_tokens=4, top_k=None), defaults=defaults).lines
    found = [(p.temperature, p.max_tokens, p.top_k) for line in lines for p in line.params if p]
    assert found == [(0.5, 9, 3), (0.5, 4, 3)]
    (line,) = batch_of(tmp_path, ask("e", "/v1/embeddings", input="x"), defaults=defaults).lines
    assert line.params == [None]
    for wrong, message in (
        ({"temprature": 1}, "'temprature' is no option of sampling, did you mean 'temperature'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": "many"}, r"top_k is a text \(many\), expected a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            batch_of(tmp_path, GOOD, defaults=wrong)
