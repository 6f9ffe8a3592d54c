"""A batch and the server answer the same request with the same body, by the same model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.batches import read, write
from helpers.served import THINKS, Served, serving
from helpers.tiny_lm import TINY

from tersor.engine.batch_file import run_batch
from tersor.engine.offline import OfflineEngine
from tersor.engine.threaded import ThreadedEngine
from tersor.llm import LLM
from tersor.server.dialect import ModelDialect

COMPLETE, CHAT, EMBED = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]
USER = {"role": "user", "content": "Say <|endoftext|> \u00e9"}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "X"}'}}],
}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (COMPLETE, {"prompt": "The rule", **GREEDY}),
    "prompts": (COMPLETE, {"prompt": ["The", "A"], "n": 2, "seed": 5, "max_tokens": 5}),
    "tokens": (COMPLETE, {"prompt": [40, 41, 42], **GREEDY, "logprobs": 3}),
    "stop": (COMPLETE, {"prompt": "def f(", "max_tokens": 30, "temperature": 0, "stop": ["e"], "logit_bias": {"9": 1}}),
    "forbidden": (COMPLETE, {"prompt": "The", **GREEDY, "logprobs": 5, "logit_bias": {"40": -100}, "min_tokens": 3}),
    "penalties": (COMPLETE, {"prompt": "a a a", **GREEDY, "repetition_penalty": 1.5, "frequency_penalty": 1}),
    "special": (COMPLETE, {"prompt": "x", **GREEDY, "ignore_eos": True, "skip_special_tokens": False}),
    "chat": (CHAT, {"messages": [USER], **GREEDY}),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}], **GREEDY}),
    "probabilities": (CHAT, {"messages": [USER], **GREEDY, "logprobs": True, "top_logprobs": 2, "n": 2}),
    "limit": (CHAT, {"messages": [USER], "temperature": 0, "max_completion_tokens": 3, "stop": "the"}),
    "tools": (CHAT, {"messages": [USER, CALLED, {"role": "tool", "content": "5", "tool_call_id": "a"}], **GREEDY}),
    "may call": (CHAT, {"messages": [USER], "tools": TOOLS, **GREEDY, "parallel_tool_calls": False}),
    "no call": (CHAT, {"messages": [USER], "tools": TOOLS, "tool_choice": "none", **GREEDY}),
    "service": (CHAT, {"messages": [USER], **GREEDY, "store": True, "cache_salt": "a", "modalities": ["text"]}),
    "state": (EMBED, {"input": "The rule", "model": "tiny-lm", "user": "a", "cache_salt": "b"}),
    "states": (EMBED, {"input": [[40, 41, 42], [40], [40, 41, 42]], "encoding_format": "float"}),
    "bad role": (CHAT, {"messages": [{"role": "robot", "content": "x"}]}),
    "bad option": (CHAT, {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}}),
    "bad tools": (CHAT, {"messages": [USER], "tool_choice": "required"}),
    "bad name": (COMPLETE, {"prompt": "x", "max_tokns": 3}),
    "bad token": (COMPLETE, {"prompt": "x", "logit_bias": {"99999": 1}}),
    "bad number": (COMPLETE, {"prompt": "x", "temperature": -1}),
    "bad dimensions": (EMBED, {"input": "x", "dimensions": 64}),
    "bad input": (EMBED, {"input": ["x", ""]}),
    "bad format": (EMBED, {"input": "x", "encoding_format": "f2"}),
    "bad state": (EMBED, {"input": [[99999]]}),
    "too long to embed": (EMBED, {"input": "x" * 5000}),
    "too long": (COMPLETE, {"prompt": "x", "max_tokens": 5000}),
}


@pytest.fixture(scope="module")
def model() -> Iterator[LLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = LLM(TINY, device="cpu", kv_bytes=1 << 23, max_rows=8, max_step_tokens=256, prefix_caching=False)
    found.tokenizer.chat_template = THINKS
    yield found
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def answered(model: LLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a batch answers to each body, or the line that says why not; all of them are in one file."""
    folder, info = tmp_path_factory.mktemp("batch"), model.info
    dialect = ModelDialect(model.tokenizer, info.context, info.vocabulary, defaults=model.core.defaults)
    lines = [{"custom_id": name, "method": "POST", "url": url, "body": body} for name, (url, body) in BODIES.items()]
    source, output = write(folder / "in.jsonl", lines), folder / "out.jsonl"
    run_batch(source, output, OfflineEngine(model.core), dialect, model=info.name, identity={})
    answers = {one["custom_id"]: one["response"]["body"] for one in read(output)}
    return answers | {one["custom_id"]: one["error"]["message"] for one in read(folder / "out.errors.jsonl")}


@pytest.fixture(scope="module")
def server(model: LLM, answered: dict[str, Any]) -> Iterator[Served]:
    """The server, once the batch has ended: an engine has one thread."""
    with serving(ThreadedEngine(model.core, model.info)) as served:
        yield served


def alike(one: Any, other: Any) -> bool:
    """Whether two bodies are the same but for what names them, and for rounding of sums in another order."""
    if isinstance(one, dict):
        names = one.keys() - {"id", "created"}
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in names)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == (pytest.approx(other, abs=1e-4) if isinstance(one, float) else other)


@pytest.mark.parametrize("name", BODIES)
def test_a_batch_answers_what_the_server_answers(name: str, answered: dict[str, Any], server: Served) -> None:
    url, body = BODIES[name]
    response = server.post(url, body)
    if response.status_code == 200:
        assert alike(answered[name], response.json())
    else:
        assert isinstance(answered[name], str), "the server refuses it"
        assert name.startswith(("bad", "too long")), json.dumps(response.json())
