"""Last states of prompts: what transformers computes, in any company, and what clients of the server see of them."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import torch
from helpers import tiny_lm
from helpers.served import Served, serving
from numpy.typing import NDArray

from tersor import LLM, SamplingParams
from tersor.engine.outputs import STOP
from tersor.engine.threaded import ThreadedEngine
from tersor.errors import InputError, TersorError

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_length": 256}
SHARED = list(range(300, 430))
PROMPTS = [[7], [8, 9], SHARED[:63], SHARED[:64], SHARED[:65], [*SHARED, 5], [*SHARED, 6], SHARED * 2, [7]]
PROMPTS[7] = PROMPTS[7][:256]  # all that the context holds
GREEDY = SamplingParams(max_tokens=70, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny_lm.TINY, kv_bytes=1 << 23, max_rows=8, max_step_tokens=48, **OPTIONS)


def expected(tokens: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        state = tiny_lm.model().model(torch.tensor([tokens])).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(state.float(), dim=-1).numpy()


def check(found: list[Any], prompts: list[list[int]]) -> None:
    assert [one.prompt_token_ids for one in found] == prompts
    for one, tokens in zip(found, prompts, strict=True):
        assert one.outputs.embedding.dtype == np.float32 and one.error is None
        np.testing.assert_allclose(one.outputs.embedding, expected(tokens), rtol=0, atol=2e-6)


def test_last_states_are_those_of_transformers_and_prefixes_are_computed_once(llm: LLM) -> None:
    check(llm.embed(PROMPTS), PROMPTS)
    again = llm.embed(PROMPTS[::-1])
    check(again, PROMPTS[::-1])
    assert [one.num_cached_tokens for one in again[::-1]][2:8] == [0, 0, 64, 128, 128, 192]
    assert llm.core.stats().generated_tokens == 0 and llm.core.stats().pages_used == 0


def test_a_text_is_encoded_as_a_prompt_is_and_stands_by_its_state(llm: LLM) -> None:
    (one,) = llm.embed("The first rule")
    assert one.prompt == "The first rule"
    check([one], [llm.tokenizer("The first rule")["input_ids"]])
    assert llm.embed([]) == []


def test_one_row_after_another_gives_the_states_of_all_at_once(llm: LLM) -> None:
    alone = LLM(tiny_lm.TINY, kv_bytes=1 << 21, max_rows=1, max_step_tokens=5, prefix_caching=False, **OPTIONS)
    check(alone.embed(PROMPTS[:6]), PROMPTS[:6])


def test_states_and_texts_run_beside_each_other_though_pages_run_out(llm: LLM) -> None:
    core = LLM(tiny_lm.TINY, kv_bytes=5 << 18, max_rows=6, max_step_tokens=32, **OPTIONS).core
    texts = {f"text {i}": PROMPTS[i] for i in (0, 2, 4)}
    states = {f"state {i}": PROMPTS[i] for i in range(9) if i != 7}
    for name in [*texts, *states]:
        core.add(name, (texts | states)[name], GREEDY if name in texts else None)
    found = {}
    while core.unfinished:
        found |= {output.request_id: output for output in core.step(partial=False)}
        core.scheduler.audit()
    assert core.stats().preemptions > 0
    for name, output in zip(texts, llm.generate(list(texts.values()), GREEDY), strict=True):
        assert found[name].outputs[0].token_ids == output.outputs[0].token_ids and found[name].embedding is None
    for name, tokens in states.items():
        (one,) = found[name].outputs
        assert (one.token_ids, one.finish_reason) == ([], STOP)
        np.testing.assert_allclose(found[name].embedding, expected(tokens), rtol=0, atol=2e-6)
    assert core.stats().generated_tokens == 70 * len(texts)


def test_a_state_comes_from_no_graph_also_where_one_token_is_left(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(llm.runner, "graphs", {8: None})
    size = llm.runner._graph_size
    monkeypatch.setattr(llm.runner, "_graph_size", lambda step: steps.append(step.decodes) or size(step))
    prompt = list(range(500, 549))  # a step takes 48
    check(llm.embed([prompt]), [prompt])
    assert steps == [0, 1]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * 257, "prompt 1: the prompt has 257 tokens, and the context is 256"),
        ([], "prompt 1: the prompt has no tokens"),
        ([8192], "prompt 1 holds token 8192, and the model has 8192"),
    ],
)
def test_a_prompt_that_has_no_state_is_refused_and_nothing_runs(llm: LLM, prompt: list[int], message: str) -> None:
    before = llm.core.stats().prompt_tokens
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        llm.embed([[1], prompt])
    assert llm.core.stats().prompt_tokens == before


def test_a_state_that_is_not_finite_is_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = llm.runner.decoder.norm
    monkeypatch.setattr(llm.runner.decoder, "norm", lambda x: norm(x) / 0)
    with pytest.raises(TersorError, match=r"^prompt 0: the model's logits are not finite$"):
        llm.embed([[3, 4]])
    assert not llm.core.unfinished


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    llm = LLM(tiny_lm.TINY, kv_bytes=1 << 22, max_rows=8, max_step_tokens=64, **OPTIONS)
    with serving(ThreadedEngine(llm.core, llm.info)) as served:
        yield served
        assert served.idle()


def test_the_openai_client_reads_states_as_bytes_and_as_numbers(server: Served) -> None:
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = server.openai.embeddings.create(model="tiny-lm", input=PROMPTS[:3], **options)
        assert answer.model == "tiny-lm" and [one.index for one in answer.data] == [0, 1, 2]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 66
        for one, tokens in zip(answer.data, PROMPTS, strict=False):
            found: Any = one.embedding
            if options.get("encoding_format") == "base64":
                found = np.frombuffer(base64.b64decode(found), "<f4")
            np.testing.assert_allclose(found, expected(tokens), rtol=0, atol=2e-6)
    (text,) = server.openai.embeddings.create(model="tiny-lm", input="The first rule").data
    tokens = server.post("/tokenize", {"prompt": "The first rule"}).json()["tokens"]
    np.testing.assert_allclose(text.embedding, expected(tokens), rtol=0, atol=2e-6)
    assert server.idle() and "tersor_generated_tokens_total 0\n" in server.http.get("/metrics").text


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        ({"input": "a", "dimensions": 8}, "dimensions is not supported: leave it out", "dimensions"),
        ({"input": []}, "input is empty: give a text or tokens", "input"),
        ({"input": ["a", ""]}, "input is empty: give a text or tokens", "input"),
        ({"input": [[8192]]}, "input holds token 8192, the model has 8192", "input"),
        ({"input": [1] * 257}, "the input has 257 tokens and the model's context is 256", "input"),
        ({"input": "a", "encoding_format": "f4"}, "encoding_format: Input should be 'float' or 'base64'", None),
    ],
)
def test_a_request_for_states_that_cannot_be_is_one_line(
    server: Served, body: dict[str, Any], words: str, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.openai.post("/embeddings", cast_to=object, body=body)
    assert refused.value.body["message"] == words  # type: ignore[index,call-overload]
    assert refused.value.param == (param or "encoding_format")
