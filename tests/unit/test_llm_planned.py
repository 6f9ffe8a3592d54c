"""llm.py: prompts in, outputs in their order, planned or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import tiny_lm

from tersor import LLM, SamplingParams
from tersor.engine.outputs import RequestOutput
from tersor.errors import InputError

PREFIX = list(range(40, 200))
PROMPTS = [
    "The first rule",
    [*PREFIX, 7, 8],
    [5],
    [*PREFIX, 9],
    "The first rule",
    [*PREFIX[:100], 3],
    [*PREFIX, 7, 8],
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread costs a model of this size more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answers(params: SamplingParams, **options: object) -> tuple[LLM, list[RequestOutput]]:
    model = LLM(tiny_lm.TINY, device="cpu", kv_bytes=1 << 22, max_length=512, seed=3, **options)
    return model, model.generate(PROMPTS, params)


@pytest.mark.parametrize("sampled", [{"temperature": 0}, {"temperature": 0.9, "top_k": 50}, {}])
def test_a_plan_changes_no_token(sampled: dict[str, float]) -> None:
    params = SamplingParams(max_tokens=6, logprobs=1, **sampled)
    planned, found = answers(params)
    plain, expected = answers(params, prefix_caching=False)
    for one, other in zip(found, expected, strict=True):
        assert (one.request_id, one.prompt, one.prompt_token_ids) == (
            other.request_id,
            other.prompt,
            other.prompt_token_ids,
        )
        assert [each.token_ids for each in one.outputs] == [each.token_ids for each in other.outputs]
        assert [each.text for each in one.outputs] == [each.text for each in other.outputs]
    assert plain.core.scheduler.cached_tokens == 0
    assert planned.core.scheduler.cached_tokens > 0
    alone = 5 if sampled == {"temperature": 0} else 7  # equal greedy prompts run once
    assert planned.core.scheduler.drawn_tokens == alone * 6 and plain.core.scheduler.drawn_tokens == 42


def test_the_longest_text_need_not_fill_its_last_page() -> None:
    model = LLM(tiny_lm.TINY, device="cpu", kv_bytes=1 << 22, max_length=100)
    outputs = model.generate([[5] * 70, [6] * 30], SamplingParams(temperature=0, ignore_eos=True))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [30, 70]


@pytest.mark.parametrize("planned", [False, True])
def test_who_stops_in_the_middle_leaves_the_engine_as_it_was(planned: bool) -> None:
    model = LLM(tiny_lm.TINY, device="cpu", kv_bytes=1 << 22, max_length=512, prefix_caching=planned)

    def stop(output: RequestOutput) -> None:
        raise KeyboardInterrupt

    lengths = [SamplingParams(temperature=0, max_tokens=2 + 9 * index, ignore_eos=True) for index in range(7)]
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPTS, lengths, on_finished=stop)
    assert not model.core.unfinished and not model.core.scheduler.cache.pinned
    assert len(model.generate(PROMPTS, lengths)) == 7
    model.core.scheduler.audit()


def test_nothing_runs_where_one_prompt_can_never_be_served() -> None:
    model = LLM(tiny_lm.TINY, device="cpu", kv_bytes=1 << 22, max_length=512)
    ended: list[str] = []
    for prompt, what in (
        ([3] * 600, "600 tokens, and the context is 512"),
        ([9999], "holds token 9999"),
        ([], "no tok"),
    ):
        with pytest.raises(InputError, match=f"prompt 1.*{what}"):
            model.generate(
                [[5], prompt], SamplingParams(max_tokens=2), on_finished=lambda one: ended.append(one.request_id)
            )
    assert not ended and not model.core.unfinished
    assert model.generate([[5]], SamplingParams(max_tokens=2, temperature=0))[0].finished
