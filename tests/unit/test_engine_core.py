"""engine/core.py: requests run through the loop, one step ahead of what is read."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from helpers.fake_core import TOKENIZER, Fake, core, run, solo

from tersor.engine.outputs import ABORT, ERROR, LENGTH, STOP
from tersor.engine.params import SamplingParams
from tersor.engine.request import Step
from tersor.errors import InputError, TersorError


def test_requests_together_draw_what_each_draws_alone() -> None:
    engine = core(pages=30)
    prompts = {f"r{i}": [random.Random(i).randrange(400) for _ in range(1 + i % 11)] for i in range(20)}
    for name, prompt in prompts.items():
        engine.add(name, prompt, SamplingParams(max_tokens=3 + len(prompt), n=1 + len(prompt) % 2))
    found = run(engine)
    for name, prompt in prompts.items():
        assert [one.token_ids for one in found[name].outputs] == [
            solo(prompt, 3 + len(prompt), index) for index in range(1 + len(prompt) % 2)
        ]
        assert all(one.finish_reason == LENGTH for one in found[name].outputs)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert stats.prompt_tokens == sum(len(prompt) * (1 + len(prompt) % 2) for prompt in prompts.values())
    assert stats.generated_tokens == sum(len(one.token_ids) for output in found.values() for one in output.outputs)


def test_a_stop_text_and_an_end_token_cut_what_runs_ahead() -> None:
    tokens = solo([5, 6], 12)
    text = TOKENIZER.decode(tokens[:7])[-3:]
    engine = core(eos=(tokens[9],))
    engine.add("text", [5, 6], SamplingParams(max_tokens=12, stop=[text]))
    engine.add("end", [5, 6], SamplingParams(max_tokens=12))
    found = run(engine)
    assert found["text"].outputs[0].stop_reason == text and text not in found["text"].outputs[0].text
    assert len(found["text"].outputs[0].token_ids) <= 7
    assert found["end"].outputs[0].token_ids == tokens[:10]
    assert found["end"].outputs[0].finish_reason == STOP


def test_partial_outputs_do_not_grow_after_they_were_given() -> None:
    engine = core()
    engine.add("a", [7], SamplingParams(max_tokens=5, logprobs=None))
    lengths, kept = [], []
    while engine.unfinished:
        for output in engine.step():
            kept.append(output)
            lengths.append(len(output.outputs[0].token_ids))
    assert lengths == [1, 2, 3, 4, 5] == [len(one.outputs[0].token_ids) for one in kept]


def test_an_aborted_request_ends_with_what_it_has_and_others_go_on() -> None:
    engine = core()
    engine.add("a", [7], SamplingParams(max_tokens=40))
    engine.add("b", [8], SamplingParams(max_tokens=6))
    for _ in range(4):
        engine.step()
    engine.abort("a")
    engine.abort("a")
    engine.abort("never")
    found = run(engine)
    assert found["a"].outputs[0].finish_reason == ABORT and found["a"].outputs[0].token_ids == solo([7], 3)
    assert found["b"].outputs[0].token_ids == solo([8], 6)


def test_a_name_can_be_used_again_once_its_request_was_aborted() -> None:
    engine = core()
    engine.add("a", [7], SamplingParams(max_tokens=40))
    engine.step()
    engine.abort("a")
    engine.add("a", [9], SamplingParams(max_tokens=2))
    outputs = []
    while engine.unfinished:
        outputs += engine.step(partial=False)
    assert [one.outputs[0].finish_reason for one in outputs] == [ABORT, LENGTH]
    assert outputs[1].outputs[0].token_ids == solo([9], 2)


def test_logits_that_are_not_finite_end_that_request_alone() -> None:
    engine = core(bad=6)
    engine.add("a", [7, 7, 7], SamplingParams(max_tokens=9))
    engine.add("b", [8], SamplingParams(max_tokens=3))
    found = run(engine)
    assert found["a"].outputs[0].finish_reason == ERROR and found["a"].error == "the model's logits are not finite"
    assert found["a"].outputs[0].token_ids == solo([7, 7, 7], 3)
    assert found["b"].outputs[0].finish_reason == LENGTH and found["b"].error is None


def test_a_request_that_cannot_be_is_refused_alone() -> None:
    engine = core()
    engine.add("a", [7], SamplingParams(max_tokens=2))
    with pytest.raises(InputError, match="the prompt has 60 tokens, and the context is 60"):
        engine.add("b", [1] * 60, SamplingParams(n=3))
    with pytest.raises(InputError, match="there is a request of this id already"):
        engine.add("a", [7], SamplingParams())
    assert list(run(engine)) == ["a"]


@dataclass
class Failing(Fake):
    """Fails once, at a launch or at a wait, counted together.

    Attributes:
        calls: launches and waits that are left until then.
        error: what is raised.
    """

    calls: int = 0
    error: BaseException = field(default_factory=RuntimeError)

    def call(self) -> None:
        self.calls -= 1
        if self.calls == -1:
            raise self.error

    def launch(self, step: Step, masks: object) -> Any:
        self.call()
        launched, tokens = super().launch(step, masks), self.call

        class Waiting(type(launched)):  # type: ignore[misc]
            def tokens(self) -> list[int]:
                tokens()
                found: list[int] = super().tokens()
                return found

        return Waiting(launched.step, launched.bad)


@pytest.mark.parametrize("error", [TersorError("memory ran out"), KeyboardInterrupt()])
@pytest.mark.parametrize("calls", range(14))
def test_a_step_that_fails_or_is_interrupted_leaves_an_engine_that_goes_on(calls: int, error: BaseException) -> None:
    engine = core(pages=16)
    engine.runner = Failing(calls=calls, error=error)
    names = [f"r{number}" for number in range(6)]
    for number, name in enumerate(names):
        engine.add(name, [30 + number] * (5 + 3 * number), SamplingParams(max_tokens=4 + number, n=1 + number % 2))
    with pytest.raises(type(error)):
        run(engine)
    engine.scheduler.audit()
    for name in names[::2]:  # others may go on
        engine.abort(name)
    run(engine)
    assert not engine.unfinished and not engine.scheduler.steps and engine.stats().pages_used == 0
    assert len(engine.scheduler.free_slots) == 8
    engine.add("again", [7, 8], SamplingParams(max_tokens=9))
    assert run(engine)["again"].outputs[0].token_ids == solo([7, 8], 9)
