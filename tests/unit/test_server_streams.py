"""What a server sends: shapes of streams and of whole answers, by the openai client and by plain HTTP."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_engine import FakeEngine
from helpers.served import Served, serving, tokenizer

from tersor.engine.outputs import Logprob
from tersor.server.logprobs import LEAST, PlainEntries, TokenBytes, chat_entries
from tersor.server.sse import until_gone

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40}
SAYS = "Na\u00efve caf\u00e9 \U0001f642\U0001f680 end"


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    with serving(FakeEngine(tokenizer())) as served:
        yield served


@pytest.fixture
def server(running: Served) -> Iterator[Served]:
    """One server for the module; each test starts with nothing told to the engine and leaves nothing in it."""
    engine = running.engine
    engine.burst, engine.asked = 1, []
    yield running
    assert running.idle() and not engine._says


def text_of(events: list[Any], index: int = 0) -> str:
    """The text of an answer in a stream."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(one["delta"].get("content") or "" if "delta" in one else one["text"] for one in choices)


def test_usage_comes_in_a_last_chunk_without_choices_and_only_if_asked_for(server: Served) -> None:
    """Rule 1."""
    for options in ({}, {"include_usage": False}, None):
        server.engine.say("Yes.")
        events = server.events(CHAT, {**HELLO, "stream_options": options})
        assert all(event["choices"] and "usage" not in event for event in events)
    server.engine.say("Yes.")
    *others, last = server.events(CHAT, {**HELLO, "stream_options": {"include_usage": True}})
    assert all(event["choices"] and event["usage"] is None for event in others)
    assert last["choices"] == []
    prompt, drawn = len(server.engine.asked[-1][0]), len(server.engine._encode("Yes.")) + 1
    assert last["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    *others, last = server.events("/v1/completions", {"prompt": "a", "max_tokens": 3, "stream_options": {}})
    assert last["choices"][0]["finish_reason"] == "length"


def test_every_chunk_is_whole_and_the_first_one_has_the_role(server: Served) -> None:
    """Rule 2."""
    server.engine.say("One two three.", "Four.")
    events = server.events(CHAT, {**HELLO, "n": 2})
    for key in ("id", "object", "created", "model"):
        assert len({event[key] for event in events}) == 1 and events[0][key]
    assert events[0]["object"] == "chat.completion.chunk"
    for index, text in enumerate(("One two three.", "Four.")):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in choices[1:])
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert text_of(events, index) == text


@pytest.mark.parametrize("burst", [1, 3])
def test_a_character_is_never_cut_in_a_stream(server: Served, burst: int) -> None:
    """Rule 3."""
    server.engine.burst = burst
    server.engine.say(SAYS)
    events = server.events(CHAT, HELLO)
    assert text_of(events) == SAYS
    assert "\ufffd" not in "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def test_what_is_left_of_a_character_is_shown_at_the_end(server: Served) -> None:
    """Rule 3, of an answer that ends within a character, and of a prompt that does."""
    half = server.engine._encode("\U0001f642")
    assert len(half) > 2
    server.engine.say("\U0001f642")
    events = server.events("/v1/completions", {"prompt": half[:2], "max_tokens": 2})
    assert text_of(events) == "\ufffd"
    server.engine.say("\U0001f642")
    events = server.events("/v1/completions", {"prompt": half[:2], "max_tokens": 2, "echo": True})
    assert text_of(events).startswith("\ufffd")


@pytest.mark.parametrize("burst", [1, 4])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_text_across_tokens_never_leaks_and_everything_agrees(server: Served, burst: int, include: bool) -> None:
    """Rule 4."""
    server.engine.burst = burst
    body = {**HELLO, "stop": ["STOP here"], "logprobs": True, "include_stop_str_in_output": include}
    server.engine.say("Go on. STOP there. STOP here and more", "Go on. STOP there. STOP here and more")
    wanted = "Go on. STOP there. " + ("STOP here" if include else "")
    *events, last = server.events(CHAT, {**body, "stream_options": {"include_usage": True}})
    assert text_of(events) == wanted
    entries = [one for event in events for one in (event["choices"][0]["logprobs"] or {}).get("content", [])]
    whole = server.post(CHAT, body).json()
    choice = whole["choices"][0]
    assert choice["message"]["content"] == wanted and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["content"] == entries
    assert whole["usage"]["completion_tokens"] == last["usage"]["completion_tokens"] == len(entries)
    assert "".join(entry["token"] for entry in entries).startswith("Go on. STOP there. STOP here")
    assert "more" not in "".join(entry["token"] for entry in entries)


@pytest.mark.parametrize("burst", [1, 5])
def test_every_token_has_one_entry_of_log_probabilities_whatever_chunk_it_comes_in(server: Served, burst: int) -> None:
    """Rule 8."""
    server.engine.burst = burst
    tokens = [*server.engine._encode(SAYS), 0]
    body = {**HELLO, "logprobs": True, "top_logprobs": 3}
    server.engine.say(SAYS, SAYS)
    entries = [
        one for event in server.events(CHAT, body) for one in (event["choices"][0]["logprobs"] or {}).get("content", [])
    ]
    assert len(entries) == len(tokens)
    assert b"".join(bytes(entry["bytes"]) for entry in entries[:-1]).decode() == SAYS
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
    whole = server.chat(logprobs=True, top_logprobs=3)
    assert [one.model_dump() for one in whole.choices[0].logprobs.content] == entries


def test_plain_completions_show_log_probabilities_in_their_own_shape(server: Served) -> None:
    """Rule 8."""
    tokens = server.engine._encode(SAYS)
    server.engine.say(SAYS, SAYS)
    found = server.complete(logprobs=2, max_tokens=40).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(tokens) + 1
    assert found.text_offset[0] == 0 and found.text_offset[-1] == len(SAYS)
    assert found.text_offset == sorted(found.text_offset)
    assert {len(one) for one in found.top_logprobs} <= {2, 3}
    streamed = server.events("/v1/completions", {"prompt": "Hello", "max_tokens": 40, "logprobs": 2})
    offsets = [one for event in streamed for one in (event["choices"][0]["logprobs"] or {}).get("text_offset", [])]
    assert offsets == found.text_offset


def test_bytes_of_tokens_are_those_of_their_vocabulary() -> None:
    """Rule 8: byte-level letters, or pieces with a mark for a blank and names of bytes."""
    made = tokenizer()
    bytes_of = TokenBytes(made)
    assert bytes_of(0) == b"<|endoftext|>"
    assert b"".join(bytes_of(token) for token in made(SAYS)["input_ids"]) == SAYS.encode()
    pieces = ["<0x0A>", "\u2581caf\u00e9", None]
    plain: Any = SimpleNamespace(added_tokens_decoder={}, convert_ids_to_tokens=pieces.__getitem__)
    assert [TokenBytes(plain)(token) for token in range(3)] == [b"\n", " caf\u00e9".encode(), b""]


def test_a_token_that_cannot_come_has_a_number_that_json_holds() -> None:
    found = {5: Logprob(-math.inf, 9, "a"), 6: Logprob(-1.0, 1, "b")}
    made = tokenizer()
    (entry,) = chat_entries([5], [found], 1, TokenBytes(made))
    assert entry["logprob"] == LEAST and entry["top_logprobs"][0]["token"] == "b"
    shown = PlainEntries(made, (), 1).of([5], [found])
    assert shown["token_logprobs"] == [LEAST] and shown["top_logprobs"] == [{"b": -1.0, "a": LEAST}]


def test_zero_log_probabilities_are_those_of_the_tokens_alone(server: Served) -> None:
    entry = server.chat(logprobs=True, max_tokens=2).choices[0].logprobs.content[0]
    assert entry.top_logprobs == [] and entry.logprob < 0
    assert server.complete(max_tokens=2).choices[0].logprobs is None
    assert len(server.complete(logprobs=0, max_tokens=2).choices[0].logprobs.top_logprobs[0]) == 1


def test_several_answers_and_prompts_come_in_order(server: Served) -> None:
    server.engine.say("a0", "a1", "b0", "b1")
    answer = server.complete(prompt=["First", "Second"], n=2)
    assert [(one.index, one.text) for one in answer.choices] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    server.engine.say("a0", "a1", "b0", "b1")
    events = server.events("/v1/completions", {"prompt": [[5, 6], [7]], "n": 2})
    assert [text_of(events, index) for index in range(4)] == ["a0", "a1", "b0", "b1"]
    assert [tokens for tokens, *_ in server.engine.asked[-2:]] == [[5, 6], [7]]


def test_prompts_may_be_text_tokens_or_lists_of_either(server: Served) -> None:
    tokens = server.engine._encode("Hello there")
    for prompt in ("Hello there", tokens, ["Hello there"], [tokens]):
        server.complete(prompt=prompt, max_tokens=1)
        assert server.engine.asked[-1][0] == tokens


def test_cached_tokens_are_in_the_usage(server: Served) -> None:
    prompt = [9] * 200
    first, second = (server.complete(prompt=prompt, max_tokens=1).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens < 64
    assert second.prompt_tokens_details.cached_tokens == 192


def test_models_are_listed_and_others_are_not_found(server: Served) -> None:
    (model,) = server.openai.models.list().data
    assert (model.id, model.object) == ("tiny-lm", "model")
    assert server.openai.models.retrieve("tiny-lm").id == "tiny-lm"
    for path, body in (("/v1/models/other", None), ("/v1/completions", {"model": "other", "prompt": "a"})):
        response = server.http.get(path) if body is None else server.post(path, body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_text_becomes_tokens_and_text_again(server: Served) -> None:
    found = server.post("/tokenize", {"prompt": SAYS}).json()
    assert found["count"] == len(found["tokens"]) and found["tokens"] == server.engine._encode(SAYS)
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": SAYS}
    chat = server.post("/tokenize", {"messages": HELLO["messages"]}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": chat}).json()["prompt"] == "<|endoftext|>[user]Hello[assistant]"
    assert server.post("/detokenize", {"tokens": [8192]}).status_code == 400
    assert server.post("/tokenize", {}).status_code == 400


def test_numbers_for_prometheus_count_requests_tokens_and_times(server: Served) -> None:
    def numbers() -> dict[str, float]:
        lines = [one for one in server.http.get("/metrics").text.splitlines() if not one.startswith("#")]
        return {name: float(value) for name, value in (one.rsplit(" ", 1) for one in lines)}

    before = numbers()
    server.complete(prompt=[3] * 10, max_tokens=5)
    server.post("/v1/completions", {})
    after = numbers()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['tersor_requests_total{path="/v1/completions",status="200"}'] == 1
    assert grown['tersor_requests_total{path="/v1/completions",status="400"}'] == 1
    assert (grown["tersor_prompt_tokens_total"], grown["tersor_completion_tokens_total"]) == (10, 5)
    assert grown["tersor_time_to_first_token_seconds_count"] == 1
    assert grown["tersor_time_per_output_token_seconds_count"] == 4
    assert after["tersor_pages_used"] + after["tersor_pages_free"] == server.engine.pages
    assert after['tersor_request_seconds_bucket{le="+Inf"}'] == after["tersor_request_seconds_count"]
    assert "tersor_prefix_hit_tokens_total" in after and after["tersor_healthy"] == 1


def test_a_request_keeps_its_id_or_gets_one(server: Served) -> None:
    assert server.http.get("/health", headers={"X-Request-Id": "mine-7"}).headers["x-request-id"] == "mine-7"
    for sent in ({}, {"X-Request-Id": "a b"}, {"X-Request-Id": "x" * 200}):
        given = server.http.get("/health", headers=sent).headers["x-request-id"]
        assert given.startswith("req-") and len(given) == 36


def test_work_that_fails_when_it_is_cut_off_leaves_nothing_that_waits() -> None:
    async def never() -> Any:
        await asyncio.Event().wait()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("on the way out") from None

    async def main() -> None:
        waiting = asyncio.create_task(until_gone(never, work()))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(ValueError, match="on the way out"):
            await waiting
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
