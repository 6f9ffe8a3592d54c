"""The server in front of the engine itself, with the bundled model on the CPU: what the fake engine only pretends."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from helpers.served import HERMES, Served, serving
from helpers.tiny_lm import TINY

from tersor.engine.threaded import ThreadedEngine
from tersor.llm import LLM

COMPLETE = "/v1/completions"
PAGES = 10
BYTES = (PAGES + 1) * 64 * 4 * 2 * 2 * 64 * 4
"""Of so many pages of 64 tokens: 4 layers, keys and values, 2 heads of 64 floats."""


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    llm = LLM(TINY, device="cpu", kv_bytes=BYTES, max_rows=16, max_step_tokens=256)
    llm.tokenizer.chat_template = HERMES
    with serving(ThreadedEngine(llm.core, llm.info)) as served:
        yield served
    torch.set_num_threads(threads)


@pytest.fixture
def server(running: Served) -> Iterator[Served]:
    """One server for the module; each test leaves all pages free."""
    yield running
    assert running.idle()


def texts(server: Served, **fields: Any) -> list[str]:
    """The texts of a completion."""
    response = server.post(COMPLETE, {"prompt": "The", "max_tokens": 10, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return [one["text"] for one in response.json()["choices"]]


def test_many_answers_at_once_are_each_as_alone_though_pages_run_out(server: Served) -> None:
    """Rules 13, 16 and 17: more is asked for than all pages hold, greedy and with a seed."""
    prompts = [[number + 50, number + 60] * 30 for number in range(3)]

    def ask(number: int) -> str:
        fields = {"temperature": 1, "seed": 11} if number % 3 else {}
        return texts(server, prompt=prompts[number % 3], max_tokens=72, ignore_eos=True, **fields)[0]

    alone = [ask(number) for number in range(3)]
    before = server.engine.stats().preemptions
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(12)))
    assert together == alone * 4
    assert server.engine.stats().preemptions > before


def test_clients_that_vanish_leave_all_pages_free(server: Served) -> None:
    """Rules 14, 15 and 16."""

    def ask(number: int) -> int:
        body = {
            "prompt": [number + 1] * (1 + 9 * number % 130),
            "max_tokens": 60,
            "ignore_eos": True,
            "n": 1 + number % 2,
        }
        try:
            server.post(COMPLETE, {**body, "stream": number % 3 == 0}, timeout=0.02 + 0.01 * (number % 30))
        except httpx.TimeoutException:
            return 1
        return 0

    with ThreadPoolExecutor(16) as pool:
        gone = sum(pool.map(ask, range(48)))
    assert gone > 0 and server.idle()
    assert server.engine.stats().pages_free == PAGES


def test_a_request_that_all_pages_cannot_hold_is_refused_alone(server: Served) -> None:
    """Rule 18."""
    with ThreadPoolExecutor(3) as pool:
        small = [pool.submit(texts, server, max_tokens=20) for _ in range(2)]
        large = server.post(COMPLETE, {"prompt": [5] * (64 * PAGES), "max_tokens": 20})
        streamed = server.post(COMPLETE, {"prompt": [5] * (64 * PAGES), "max_tokens": 20, "stream": True})
    assert (large.status_code, streamed.status_code) == (400, 400)
    assert "pages" in large.json()["error"]["message"]
    assert small[0].result() == small[1].result()


def test_what_was_read_is_found_again_within_a_salt(server: Served) -> None:
    """Rule 24."""

    def cached(salt: str) -> int:
        answer = server.post(COMPLETE, {"prompt": [7, 8] * 80, "max_tokens": 1, "cache_salt": salt}).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached("a"), cached("a"), cached("b")] == [0, 128, 0]


def test_log_probabilities_of_an_answer_are_those_of_the_same_prompt(server: Served) -> None:
    """Rules 7 and 8: drawn or read, a token is as likely."""
    body = {"prompt": "The first rule", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    drawn = server.post(COMPLETE, {**body, "echo": True}).json()["choices"][0]
    tokens = server.post("/tokenize", {"prompt": drawn["text"]}).json()["tokens"]
    read = server.post(COMPLETE, {**body, "prompt": tokens, "max_tokens": 0, "echo": True}).json()["choices"][0]
    assert read["text"] == drawn["text"] and read["logprobs"]["tokens"] == drawn["logprobs"]["tokens"]
    found, wanted = (one["logprobs"]["token_logprobs"][1:] for one in (read, drawn))
    assert found == pytest.approx(wanted, abs=1e-3)
    assert read["logprobs"]["token_logprobs"][0] is None
    assert all(len(one) in (2, 3) for one in read["logprobs"]["top_logprobs"][1:])


def test_a_prompt_is_echoed_whole_though_another_answer_begins_before_it_is_read(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 7: of several answers one alone reads the prompt anew, for its log probabilities, in several steps."""
    scheduler = server.engine._core.scheduler
    monkeypatch.setattr(scheduler, "limits", replace(scheduler.limits, max_prompt_logits=64))
    body = {"prompt": [7, 8, 9, 10] * 50, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "cache_salt": "echo"}
    assert server.post(COMPLETE, body).status_code == 200  # so that pages of the prompt are there
    asked = {**body, "n": 2, "echo": True, "logprobs": 1}
    response = server.post(COMPLETE, asked)
    assert response.status_code == 200, response.text
    one, other = (choice["logprobs"] for choice in response.json()["choices"])
    assert len(one["tokens"]) == len(other["tokens"]) == 202
    assert one["token_logprobs"] == pytest.approx(other["token_logprobs"], abs=1e-3)
    pieces = [event["choices"][0] for event in server.events(COMPLETE, asked)]
    for index in range(2):
        own = [piece["logprobs"]["tokens"] for piece in pieces if piece["index"] == index and piece["logprobs"]]
        assert [token for tokens in own for token in tokens] == one["tokens"]


def test_a_stop_text_ends_the_engines_own_text(server: Served) -> None:
    """Rule 4."""
    (whole,) = texts(server, max_tokens=30)
    stop = whole[8:11]
    cut = whole[: whole.index(stop)]
    body = {"prompt": "The", "max_tokens": 30, "temperature": 0, "stop": stop}
    answer = server.post(COMPLETE, {**body, "logprobs": 0}).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (cut, "stop")
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"] < 30
    events = server.events(COMPLETE, body)
    assert "".join(event["choices"][0]["text"] for event in events) == cut


def test_a_bias_and_answers_of_several_seeds_reach_the_model(server: Served) -> None:
    assert texts(server, logit_bias={"42": 100}, max_tokens=3) == [server.engine.info.tokenizer.decode([42]) * 3]
    several = texts(server, n=3, temperature=1, seed=5)
    assert len(set(several)) > 1 and several == texts(server, n=3, temperature=1, seed=5)


def test_streams_begin_before_answers_end(server: Served) -> None:
    body = {"prompt": "The", "max_tokens": 200, "ignore_eos": True, "stream": True}
    begun = time.perf_counter()
    with server.http.stream("POST", COMPLETE, json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        first = time.perf_counter() - begun
        *_, done = lines
    assert done == "data: [DONE]" and first < (time.perf_counter() - begun) / 3


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Give"}], "max_tokens": 80, "temperature": 0}
needs_grammars = pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="needs xgrammar")


def held(schema: Any) -> dict[str, Any]:
    """The field that holds an answer to a schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


@needs_grammars
def test_an_answer_is_held_to_its_schema_and_a_bad_schema_is_refused_alone(server: Served) -> None:
    """Rules 20 and 21."""
    choice = server.post("/v1/chat/completions", {**CHAT, **held(SCHEMA)}).json()["choices"][0]
    found = json.loads(choice["message"]["content"])
    assert set(found) == {"a", "b"} and found["a"] <= 99 and found["b"] in ("x", "y")
    assert choice["finish_reason"] == "stop"
    refused = server.post("/v1/chat/completions", {**CHAT, **held({"type": "nothing"})})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "response_format"
    short = server.post("/v1/chat/completions", {**CHAT, **held({"type": "array"}), "max_tokens": 4}).json()
    assert short["usage"]["completion_tokens"] <= 4
    assert texts(server) == texts(server)


@needs_grammars
def test_a_model_that_must_call_a_function_calls_it(server: Served) -> None:
    """Rule 22, by a model that was never taught to."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        body = {**CHAT, "tools": tools, "tool_choice": choice}
        (call,) = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "f" and set(json.loads(call["function"]["arguments"])) == {"a", "b"}
        deltas = [event["choices"][0]["delta"] for event in server.events("/v1/chat/completions", body)]
        pieces = [one["function"]["arguments"] for delta in deltas for one in delta.get("tool_calls", [])]
        assert "".join(pieces) == call["function"]["arguments"] and len(pieces) > 3


def test_without_the_package_for_grammars_a_schema_is_refused(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "xgrammar" else found(name, *more)
    )
    monkeypatch.setattr(server.engine._core, "_grammars", None)
    refused = server.post("/v1/chat/completions", {**CHAT, **held(SCHEMA)})
    assert refused.status_code == 400 and "tersor[grammar]" in refused.json()["error"]["message"]
