"""tersor.LLM: prompts answered by the engine on a CPU, with the bundled model."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import math
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_lm

import tersor
from tersor import LLM, SamplingParams
from tersor.engine.launched import Launched
from tersor.engine.outputs import LENGTH, STOP
from tersor.engine.threaded import ThreadedEngine
from tersor.errors import InputError, UnsupportedError

PROMPTS = ["def read_file(path):", "The first rule", "import torch\n" * 6, "x"]
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny_lm.TINY, device="cpu", max_rows=48, max_step_tokens=64, kv_bytes=64 << 20)


def expected(prompt: str, count: int) -> list[int]:
    ids = tiny_lm.tokenizer()(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = tiny_lm.model().generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [int(token) for token in out[0, ids.shape[1] :]]


def texts(outputs: list[tersor.engine.outputs.RequestOutput]) -> list[list[int]]:  # type: ignore[name-defined]
    return [one.token_ids for output in outputs for one in output.outputs]


def test_greedy_tokens_are_those_of_transformers(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.prompt for output in outputs] == PROMPTS
    assert texts(outputs) == [expected(prompt, 16) for prompt in PROMPTS]
    assert all(one.finish_reason == LENGTH for output in outputs for one in output.outputs)
    llm.core.scheduler.audit()


def test_a_seed_gives_the_same_text_in_any_company(llm: LLM) -> None:
    alone = texts(llm.generate(PROMPTS[1], DRAWN))
    together = llm.generate([PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[3]], [GREEDY, DRAWN, DRAWN, DRAWN])
    assert texts(together)[1:3] == alone * 2 and texts(together)[0] == expected(PROMPTS[0], 16)


def test_continuations_differ_and_the_first_is_that_of_one(llm: LLM) -> None:
    several = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True, n=3)
    (output,) = llm.generate(PROMPTS[1], several)
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    assert output.outputs[0].token_ids == texts(llm.generate(PROMPTS[1], DRAWN))[0]


def test_a_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[1], DRAWN)
    seen = list(llm.stream(PROMPTS[1], DRAWN))
    assert [len(output.outputs[0].token_ids) for output in seen] == list(range(1, 13))
    texts = [output.outputs[0].text for output in seen]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert [output.finished for output in seen] == [False] * 11 + [True]
    assert seen[-1].outputs == whole.outputs and seen[-1].prompt == PROMPTS[1]


def test_a_stream_that_has_ended_leaves_the_model_to_others_while_somebody_keeps_it(llm: LLM) -> None:
    kept = llm.stream(PROMPTS[1], DRAWN)
    while not next(kept).finished:
        pass
    (wanted,) = llm.generate(PROMPTS[0], GREEDY)
    other = llm.stream(PROMPTS[0], GREEDY)
    next(other)
    kept.close()
    *_, last = other
    assert last.outputs[0].token_ids == wanted.outputs[0].token_ids


def test_a_stream_that_is_closed_early_leaves_nothing_and_an_open_one_is_alone(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[1], SamplingParams(n=3, max_tokens=500, ignore_eos=True))
    next(stream)
    for asked in (lambda: llm.generate("x", GREEDY), lambda: next(llm.stream("x", GREEDY))):
        with pytest.raises(InputError, match="a stream of this model is open"):
            asked()
    stream.close()
    assert not llm.core.unfinished and len(llm.core.scheduler.free_slots) == 48
    llm.core.scheduler.audit()
    with pytest.raises(InputError, match="the prompt has no tokens"):
        next(llm.stream([]))
    assert texts(llm.generate("x", GREEDY)) == [expected("x", 16)]


@pytest.mark.timeout(60)
def test_a_thread_that_asks_beside_another_is_refused_and_changes_no_text_of_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one begins first, and adds its prompts while those of the first run."""
    begun, running, done, check = threading.Event(), threading.Event(), threading.Event(), llm.core.check
    second: list[Any] = []

    def waiting(*arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            running.wait(5)
        check(*arguments)

    def ask() -> None:
        try:
            second.append(texts(llm.generate(PROMPTS[2:], GREEDY)))
        except InputError as error:
            second.append(str(error))
        done.set()

    def ended(output: Any) -> None:
        running.set()
        done.wait(5)

    monkeypatch.setattr(llm.core, "check", waiting)
    thread = threading.Thread(target=ask)
    thread.start()
    begun.wait(5)
    params = [replace(GREEDY, max_tokens=count) for count in (4, 16)]
    try:
        first: Any = texts(llm.generate(PROMPTS[:2], params, on_finished=ended))
    except InputError as error:
        first = str(error)
    running.set()
    thread.join()
    wanted = [expected(PROMPTS[0], 4), expected(PROMPTS[1], 16)], [expected(prompt, 16) for prompt in PROMPTS[2:]]
    refused = [answer for answer in (first, *second) if isinstance(answer, str)]
    assert len(refused) == 1 and refused[0].startswith("a stream of this model is open, or another thread asks it")
    assert first in (wanted[0], *refused) and second[0] in (wanted[1], *refused)
    monkeypatch.undo()
    assert texts(llm.generate("x", GREEDY)) == [expected("x", 16)]


@pytest.mark.parametrize("failing", [0, 1, 5])
@pytest.mark.parametrize("count", [1, 3])
def test_a_call_that_fails_or_is_interrupted_leaves_a_model_that_answers(
    llm: LLM, count: int, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, launch, steps = PROMPTS[:1] * count, llm.runner.launch, itertools.count()

    def fails(*arguments: Any) -> Any:
        if next(steps) == failing:
            raise torch.OutOfMemoryError("memory ran out")
        return launch(*arguments)

    monkeypatch.setattr(llm.runner, "launch", fails)
    with pytest.raises(torch.OutOfMemoryError):
        llm.generate(prompts, DRAWN)
    steps = itertools.count()
    with pytest.raises(torch.OutOfMemoryError):
        list(llm.stream(PROMPTS[1], DRAWN))
    monkeypatch.undo()
    waits, wait = itertools.count(), Launched.tokens

    def interrupted(launched: Launched) -> list[int]:
        if next(waits) == failing:
            raise KeyboardInterrupt
        return wait(launched)

    monkeypatch.setattr(Launched, "tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, DRAWN)
    monkeypatch.undo()
    llm.core.scheduler.audit()
    assert not llm.core.unfinished and len(llm.core.scheduler.free_slots) == 48
    assert texts(llm.generate("x", GREEDY)) == [expected("x", 16)]


@pytest.mark.parametrize("planned", [False, True])
def test_few_pages_and_small_steps_change_no_token(planned: bool) -> None:
    options = {"max_rows": 3, "max_step_tokens": 64, "kv_bytes": 1280 << 10, "prefix_caching": planned}
    few = LLM(tiny_lm.TINY, device="cpu", **options)
    prompts = PROMPTS[:2]
    outputs = few.generate(prompts, SamplingParams(max_tokens=135, temperature=0, ignore_eos=True))
    assert few.core.scheduler.limits.pages == 5 and few.core.stats().preemptions > 0
    assert texts(outputs) == [expected(prompt, 135) for prompt in prompts]
    few.core.scheduler.audit()


def test_a_prompt_that_was_read_is_not_read_again(llm: LLM) -> None:
    prompt = "import sys\n" * 80
    first, second = (llm.generate(prompt, GREEDY)[0] for _ in range(2))
    assert first.num_cached_tokens == 0 and second.num_cached_tokens == len(second.prompt_token_ids) // 64 * 64 > 0
    assert first.outputs == second.outputs


def test_log_probabilities_are_those_of_the_model(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = llm.generate(PROMPTS[1], params)
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    with torch.no_grad():
        logits = tiny_lm.model()(torch.tensor([ids])).logits[0].log_softmax(-1)
    given = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
    assert given[0] is None and len(given) == len(ids)
    for place, entry in enumerate(given[1:], 1):
        assert entry is not None and ids[place] in entry
        for token, one in entry.items():
            assert math.isclose(one.logprob, float(logits[place - 1, token]), abs_tol=1e-3)
            assert one.rank == 1 + int((logits[place - 1] > logits[place - 1, token]).sum())
            assert one.decoded_token == tiny_lm.tokenizer().decode([token])
    assert len(given[-1] or {}) == 2
    assert math.isclose(
        output.outputs[0].cumulative_logprob or 0.0,
        sum((entry or {})[token].logprob for token, entry in zip(ids[-3:], given[-3:], strict=True)),
    )


def test_a_packed_model_answers_as_its_decoded_weights_do(tmp_path: Path) -> None:
    tersor.quantize(tiny_lm.TINY, tmp_path / "fp6", format="fp6_e3m2")
    packed = LLM(tmp_path / "fp6", device="cpu", max_rows=4, kv_bytes=32 << 20)
    from tersor.integrations.transformers.load import load_model

    plain = load_model(tmp_path / "fp6", "cpu")
    for prompt, output in zip(PROMPTS[:2], packed.generate(PROMPTS[:2], GREEDY), strict=True):
        ids = torch.tensor([packed.tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            out = plain.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert output.outputs[0].token_ids == out[0, ids.shape[1] :].tolist()


def test_stops_penalties_and_bias_hold(llm: LLM) -> None:
    stop = tiny_lm.tokenizer().decode(expected(PROMPTS[1], 16))[6:9]
    (output,) = llm.generate(PROMPTS[1], SamplingParams(max_tokens=16, temperature=0, stop=[stop]))
    assert output.outputs[0].finish_reason == STOP and output.outputs[0].stop_reason == stop
    first = expected(PROMPTS[1], 1)[0]
    forbidden = SamplingParams(max_tokens=8, temperature=0, logit_bias={first: -100.0}, ignore_eos=True)
    wanted = SamplingParams(max_tokens=8, temperature=0, logit_bias={77: 1000.0}, frequency_penalty=2, ignore_eos=True)
    outputs = texts(llm.generate([PROMPTS[1], PROMPTS[1]], [forbidden, wanted]))
    assert first not in outputs[0] and outputs[1] == [77] * 8


@pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="needs xgrammar")
def test_a_text_matches_its_grammar_whatever_runs_beside_it(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    kinds = [{"json_schema": schema}, {"regex": "[0-9]{4}-[0-9]{2}"}, {"choice": ["yes", "no"]}, None]
    params = [SamplingParams(max_tokens=60, temperature=1.0, seed=3, grammar=kind) for kind in kinds]
    found = [output.outputs[0] for output in llm.generate([PROMPTS[1]] * 4, params)]
    assert isinstance(json.loads(found[0].text)["age"], int)
    assert re.fullmatch("[0-9]{4}-[0-9]{2}", found[1].text) and found[2].text in ("yes", "no")
    assert [one.finish_reason for one in found[:3]] == [STOP] * 3
    with pytest.raises(InputError, match="regex: not a grammar"):
        llm.generate("x", SamplingParams(grammar={"regex": "[0-9"}))


def test_a_grammar_needs_a_package(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(llm.core, "_grammars", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'tersor\[grammar\]'"):
        llm.generate("x", SamplingParams(grammar={"choice": ["a"]}))


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], None, "the prompt has no tokens"),
        ([[1] * 3000], None, "the prompt has 3000 tokens, and the context is 2048"),
        (["a", "b"], [SamplingParams()], "there are 1 params for 2 prompts"),
        (["a"], {"max_tokens": 4}, r"params are \{'max_tokens': 4\}: give tersor.SamplingParams"),
        (["a"], [4], "params are 4: give tersor.SamplingParams"),
        ([None], None, "prompt 1 is a NoneType: give a text, a list of tokens"),
        ([{"prompt_token_ids": [1]}], None, "prompt 1 is a dict: give a text, a list of tokens"),
        ([[1.5]], None, "prompt 1 holds 1.5, which is no token"),
        ([["a"]], None, "prompt 1 holds 'a', which is no token"),
        (None, SamplingParams(), "prompts are a NoneType: give a text, a list of tokens"),
    ],
)
def test_prompts_that_cannot_be_are_refused_and_nothing_runs(
    llm: LLM, prompts: list[object], params: list[SamplingParams] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        llm.generate(["fine", *prompts] if params is None else prompts, params)  # type: ignore[arg-type, list-item]
    assert not llm.core.unfinished and llm.core.stats().pages_used == 0
    assert texts(llm.generate([1, 2], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)))


def test_tokens_may_be_numbers_of_numpy(llm: LLM) -> None:
    asked = SamplingParams(max_tokens=np.int64(2), temperature=np.float32(0), ignore_eos=True)
    assert texts(llm.generate(np.array([1, 2]), asked)) == texts(llm.generate([1, 2], asked))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": "5"}, "max_tokens is '5': it must be a whole number, at least 1"),
        ({"max_tokens": 5.0}, "max_tokens is 5.0: it must be a whole number, at least 1"),
        ({"n": True}, "n is True: it must be a whole number"),
        ({"temperature": "hot"}, "temperature is 'hot': it must be a number, at least 0"),
        ({"seed": "x"}, "seed is 'x': it must be a whole number"),
        ({"logit_bias": [(1, 2)]}, "logit_bias is .*: it must be a mapping of tokens to numbers"),
        ({"stop": 5}, "stop holds 5: it must be a text"),
        ({"stop_token_ids": "end"}, "stop_token_ids holds 'end': it must be tokens"),
    ],
)
def test_sampling_params_of_another_kind_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**options)


def test_a_length_beyond_the_context_is_refused() -> None:
    with pytest.raises(InputError, match="max_length is 100000: the model's context is 2048"):
        LLM(tiny_lm.TINY, device="cpu", max_length=100_000)


def test_an_option_that_there_is_not_is_refused() -> None:
    with pytest.raises(InputError, match=r"option 'max_row', did you mean 'max_rows'\?: there are device, "):
        LLM(tiny_lm.TINY, max_row=3)


def test_chat_needs_a_template(llm: LLM) -> None:
    message = [{"role": "user", "content": "hello"}]
    if not llm.tokenizer.chat_template:
        with pytest.raises(InputError, match="the model has no chat template"):
            llm.chat(message)
    own = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    llm.tokenizer.chat_template, before = own, llm.tokenizer.chat_template
    try:
        (output,) = llm.chat(message, GREEDY)
    finally:
        llm.tokenizer.chat_template = before
    assert llm.tokenizer.decode(output.prompt_token_ids) == "<user>hello<answer>"


def test_a_thousand_streams_at_once_say_what_each_says_alone(llm: LLM) -> None:
    """Some leave early, some are aborted; nobody else's text changes, and every page comes back."""
    words = ["import", "def", "The", "class", "for", "x =", "return", "a"]
    prompts = [f"{one} {other}" for one in words for other in words[:5]]
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    alone = {prompt: texts(llm.generate(prompt, params))[0] for prompt in prompts}
    tokens = {prompt: llm.tokenizer(prompt)["input_ids"] for prompt in prompts}

    async def ask(engine: ThreadedEngine, index: int) -> None:
        prompt = prompts[index % len(prompts)]
        last = None
        async for output in engine.generate(tokens[prompt], params, request_id=f"r{index}"):
            last = output.outputs[0]
            if index % 10 == 3:
                return
            if index % 10 == 7:
                await engine.abort(f"r{index}")
        assert last is not None
        assert last.token_ids == alone[prompt][: len(last.token_ids)]
        if index % 10 != 7:
            assert last.finish_reason == LENGTH and len(last.token_ids) == 6

    async def main() -> None:
        engine = ThreadedEngine(llm.core, llm.info)
        await asyncio.gather(*(ask(engine, index) for index in range(1000)))
        await engine.close()

    asyncio.run(main())
    while llm.core.unfinished:
        llm.core.step()
    llm.core.scheduler.audit()
    assert llm.core.stats().pages_used == 0
