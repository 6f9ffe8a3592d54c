"""engine/news.py: what is told of an output a step at a time makes the same output again in another process."""

from __future__ import annotations

import pickle
import random

import numpy as np

from tersor.engine.news import Teller, begun, grow
from tersor.engine.outputs import ERROR, LENGTH, Logprob, RequestOutput
from tersor.engine.params import SamplingParams


def test_outputs_that_are_told_as_they_grow_are_whole_whatever_was_told_when() -> None:
    draw = random.Random(0)
    teller = Teller()
    for number in range(200):
        count, logprobs = draw.randrange(1, 4), draw.choice([None, 2])
        params = SamplingParams(n=count, logprobs=logprobs, prompt_logprobs=logprobs)
        output = begun(f"r{number}", [1, 2, 3], params)
        mirror = begun(f"r{number}", [1, 2, 3], params)
        if logprobs is not None:
            output.prompt_logprobs = [None, *({7: Logprob(-0.5, 1, "a")} for _ in range(2))]
            for one in output.outputs:
                one.logprobs, one.cumulative_logprob = [], 0.0
        sizes = []
        while not output.finished:
            for one in output.outputs:
                for _ in range(draw.randrange(3) if one.finish_reason is None else 0):
                    token = draw.randrange(99)
                    one.token_ids.append(token)
                    one.text += "abc"[: draw.randrange(4)]
                    if one.logprobs is not None and one.cumulative_logprob is not None:
                        one.logprobs.append({token: Logprob(-1.5, 2, "b")})
                        one.cumulative_logprob -= 1.5
                if draw.random() < 0.1:
                    one.finish_reason, one.stop_reason = draw.choice([(LENGTH, None), ("stop", "x"), ("stop", 5)])
            output.num_cached_tokens = 2
            sent = pickle.dumps(teller.news(output))
            sizes.append(len(sent))
            grow(mirror, pickle.loads(sent))
            assert mirror == output
        assert max(sizes) < 4000  # what was told is not told again
    assert not teller._told


def test_what_is_told_is_as_long_as_what_is_new() -> None:
    teller, output = Teller(), begun("a", list(range(10_000)), SamplingParams())
    output.outputs[0].token_ids = list(range(10_000))
    output.outputs[0].text = "x" * 10_000
    assert len(pickle.dumps(teller.news(output))) > 10_000
    output.outputs[0].token_ids.append(1)
    assert len(pickle.dumps(teller.news(output))) < 200


def test_errors_and_states_are_told_and_a_copy_does_not_grow() -> None:
    teller = Teller()
    failed = begun("a", [1], SamplingParams())
    failed.error, failed.outputs[0].finish_reason = "the logits are not finite", ERROR
    mirror = begun("a", [1], SamplingParams())
    grow(mirror, teller.news(failed))
    assert mirror.error == failed.error and mirror.finished
    state = begun("b", [1], None)
    state.embedding, state.outputs[0].finish_reason = np.ones(3, np.float32), "stop"
    mirror = begun("b", [1], None)
    grow(mirror, pickle.loads(pickle.dumps(teller.news(state))))
    assert mirror.finished and np.array_equal(mirror.embedding, state.embedding)  # type: ignore[arg-type]
    growing = begun("c", [1], SamplingParams(logprobs=0))
    growing.outputs[0].logprobs = []
    before: RequestOutput = growing.copied()
    growing.outputs[0].token_ids.append(4)
    growing.outputs[0].logprobs.append({})
    assert before.outputs[0].token_ids == [] and before.outputs[0].logprobs == []
