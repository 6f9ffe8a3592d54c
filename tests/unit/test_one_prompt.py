"""An engine for one prompt is as large as it needs, and what cannot run in one is known before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import own_code, tiny_lm

from tersor import LLM, one_prompt
from tersor.checkpoint.source import open_source
from tersor.engine import Sampling
from tersor.engine.scheduler import Scheduler
from tersor.errors import InputError, UnsupportedError
from tersor.models import DecoderConfig
from tersor.one_prompt import Asked

CPU = torch.device("cpu")


def asked(prompt: list[int], count: int, **options: Any) -> Asked:
    given: dict[str, Any] = {"device": CPU, **options}
    return Asked(prompt=prompt, sampling=Sampling(max_new_tokens=count, ignore_eos=True), **given)


def ready(*arguments: Any, **options: Any) -> Any:
    return one_prompt.ready(tiny_lm.TINY, tiny_lm.tokenizer(), asked(*arguments, **options))


def why(model: Path, **options: Any) -> str:
    with open_source(model) as source:
        return one_prompt.obstacle(source, asked([1], 1, **options))


@pytest.mark.parametrize(
    ("prompt", "room", "samples", "pages"),
    [(1, 1, 1, 2), (64, 1, 1, 2), (64, 2, 1, 3), (65, 64, 1, 3), (130, 64, 3, 1 + 2 + 3 * 2), (10, 60, 4, 9)],
)
def test_pages_are_those_of_the_prompt_once_and_of_what_follows(
    prompt: int, room: int, samples: int, pages: int
) -> None:
    assert one_prompt.pages_for(prompt, room, samples) == pages


@pytest.mark.parametrize("length", [63, 64, 65])
def test_rows_pages_and_steps_are_as_many_as_the_continuations_take(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    continuing, planned = ready([5] * length, 66, samples=3), []
    schedule = Scheduler.schedule

    def watched(scheduler: Scheduler) -> Any:
        step = schedule(scheduler)
        planned.append(scheduler.limits.pages - 1 - scheduler.cache.pages.free)
        return step

    monkeypatch.setattr(Scheduler, "schedule", watched)
    limits = continuing._llm.core.scheduler.limits
    pages = one_prompt.pages_for(length, 66, 3)
    assert (limits.max_rows, limits.max_step_tokens, limits.pages) == (3, 3 * length, pages)
    assert limits.context == length + 66
    rows, numbers = continuing.samples()
    assert [len(row.tokens) for row in rows] == [66] * 3 and numbers.new_tokens == 198
    assert continuing._llm.core.stats().preemptions == 0 and max(planned) == pages - 1
    continuing._llm.core.scheduler.audit()


def test_bytes_of_a_page_are_known_before_the_model_is_there() -> None:
    runner = LLM(tiny_lm.TINY, device="cpu", kv_bytes=1 << 22).runner
    with open_source(tiny_lm.TINY) as source:
        config = DecoderConfig.from_dict(source.config)
    for dtype, ratio in ((torch.float32, 1), (torch.bfloat16, 2)):
        assert one_prompt.page_bytes(config, dtype) * ratio == runner.page_bytes()


def test_a_long_prompt_is_read_in_steps_and_one_without_room_is_refused_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(one_prompt, "STEP_TOKENS", 16)
    prompt = tiny_lm.tokenizer()("import os\n" * 20)["input_ids"]
    short = ready(prompt, 4)
    assert short._llm.core.scheduler.limits.max_step_tokens == 16 < len(prompt)
    steps = list(short.stream())
    monkeypatch.undo()
    assert list(ready(prompt, 4).stream()) == steps
    monkeypatch.setattr(one_prompt, "LLM", lambda *arguments, **options: pytest.fail("loaded"))
    with pytest.raises(InputError, match="the prompt has 2048 tokens, the model 2048 positions: shorten the prompt"):
        ready([1] * 2048, 1)
    with pytest.raises(InputError, match="holds token 8192, the model has 8192"):
        ready([8192], 1)


def test_an_empty_prompt_begins_with_the_token_that_texts_begin_with() -> None:
    stream = ready([], 3).stream()
    text = "".join(stream)
    assert stream.statistics.prompt_tokens == 1
    assert text == "".join(ready([tiny_lm.tokenizer().bos_token_id], 3).stream())


def test_cuda_graphs_that_are_insisted_on_are_not_left_out_in_silence() -> None:
    with pytest.raises(UnsupportedError, match="no CUDA graph for this model: the model is on cpu"):
        LLM(tiny_lm.TINY, device="cpu", kv_bytes=1 << 22, cuda_graph=True)
    runners = [ready([1], 1, cuda_graph=choice)._llm.runner for choice in (None, False)]
    assert [runner.eager_reason for runner in runners] == ["the model is on cpu", "not asked for"]


def test_what_the_engine_does_not_run_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why(tiny_lm.TINY) == ""
    model = tiny_lm.copy(tmp_path / "model")
    own_code.edit(model / "config.json", {"architectures": ["OtherForCausalLM"]})
    assert why(model) == "OtherForCausalLM runs through transformers: the engine does not have it"
    own_code.edit(model / "config.json", {"architectures": None, "model_type": "other"})
    assert why(model) == "other runs through transformers: the engine does not have it"
    own_code.edit(model / "config.json", {"model_type": "llama", "quantization_config": {"quant_method": "awq"}})
    assert why(model).startswith("LlamaForCausalLM runs through transformers: model: ") and "awq" in why(model)
    own_code.edit(model / "config.json", {"quantization_config": None, "tie_word_embeddings": False})
    assert "lm_head" in why(model)
    own_code.edit(model / "config.json", {"tie_word_embeddings": True, "auto_map": own_code.AUTO_MAP})
    assert why(model) == ""  # whose type is known, code of its own or not
    own_code.edit(model / "config.json", {"model_type": "mine", "architectures": ["LlamaForCausalLM"]})
    assert why(model) == "LlamaForCausalLM runs through transformers: its type, mine, comes with code of its own"
    own_code.edit(model / "config.json", {"model_type": "llama", "transformers_weights": "other.bin"})
    assert "the weights are in other.bin" in why(model)
    own_code.edit(model / "config.json", {"transformers_weights": None})
    (model / "adapter_config.json").write_text("{}")
    assert why(model) == "LlamaForCausalLM runs through transformers: it has an adapter"
    gpu = torch.device("cuda")
    assert why(tiny_lm.TINY, device=gpu, dtype="float32") == (
        "LlamaForCausalLM runs through transformers: kernels take float16 and bfloat16 activations, not torch.float32"
    )
    asked_for = []
    monkeypatch.setattr(one_prompt, "environment_reason", lambda dtype, device: asked_for.append(dtype) or "")
    assert why(tiny_lm.TINY, device=gpu) == why(tiny_lm.TINY, device=gpu, dtype="float16") == ""
    assert asked_for == [torch.bfloat16, torch.float16]
    with pytest.raises(InputError, match="did you mean 'float16'"):
        ready([1], 1, dtype="float61")
