"""What an engine that fails, or that goes, leaves to what follows in its process."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models, tiny_lm

import tersor
from tersor.engine.launched import Launched

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DRAWN = tersor.SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True, n=2)


def answers(llm: tersor.LLM) -> list[list[int]]:
    outputs = llm.generate(["def read_file(path):", "The first rule", "x"], DRAWN)
    return [one.token_ids for output in outputs for one in output.outputs]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_steps_that_fail_or_are_interrupted_leave_an_engine_that_answers_as_before(
    cuda_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tersor.LLM(tiny_lm.TINY, device="cuda", kv_bytes=64 << 20, cuda_graph=cuda_graph)
    wanted = answers(llm)
    for failing in (0, 1, 9):
        steps, waits, launch, wait = itertools.count(), itertools.count(), llm.runner._run, Launched.tokens

        def runs_out(*arguments: Any, steps: Any = steps, failing: int = failing, launch: Any = launch) -> Any:
            made = launch(*arguments)
            if next(steps) == failing:
                raise torch.OutOfMemoryError("memory ran out")
            return made

        def interrupted(one: Launched, waits: Any = waits, failing: int = failing, wait: Any = wait) -> list[int]:
            if next(waits) == failing:
                raise KeyboardInterrupt
            found: list[int] = wait(one)
            return found

        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(llm.runner, "_run", runs_out)
            answers(llm)
        assert answers(llm) == wanted
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Launched, "tokens", interrupted)
            answers(llm)
        assert answers(llm) == wanted
    llm.core.scheduler.audit()


@pytest.mark.alone
def test_engines_that_go_leave_no_memory_behind(tmp_path: Path) -> None:
    model = packed_models.case("llama", tmp_path, {"format": "fp6_e3m2"}).packed
    left = []
    for _ in range(4):
        llm = tersor.LLM(model, device="cuda", kv_bytes=16 << 20, tokenizer=tiny_lm.tokenizer())
        llm.generate([[5, 6, 7]], tersor.SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        taken = llm.runner.workspace.nbytes
        del llm
        gc.collect()
        torch.cuda.empty_cache()
        left.append(torch.cuda.mem_get_info()[0])
    assert left[1] - left[3] < max(taken, 4 << 20)
