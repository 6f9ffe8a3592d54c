"""Copies of a model on GPUs of their own: greedy answers are those of one, and a lost copy finds its GPU free again."""

from __future__ import annotations

import asyncio
import multiprocessing
from typing import Any

import pytest
import torch
from helpers.tiny_lm import TINY

import tersor
from tersor.engine.config import EngineConfig
from tersor.engine.copies import Copies
from tersor.engine.stats import ANSWERS
from tersor.errors import LostError
from tersor.integrations.transformers.load import load_tokenizer
from tersor.server.engines import of_several

DEVICE = "cuda"
OPTIONS: dict[str, Any] = {"device": DEVICE, "memory": 0.2, "max_length": 512, "max_rows": 16}
PROMPTS = [[number + 5, 6, 7, number + 20] * 20 for number in range(16)]
GREEDY = tersor.SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


async def answers(copies: Copies) -> list[list[int]]:
    async def one(number: int, prompt: list[int]) -> list[int]:
        *_, last = [output async for output in copies.generate(prompt, GREEDY, request_id=f"r{number}")]
        return list(last.outputs[0].token_ids)

    return list(await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(PROMPTS))))


@pytest.mark.parametrize("ranks", [1, 2])
def test_copies_on_gpus_of_their_own_answer_as_one_and_are_started_again(ranks: int) -> None:
    if torch.cuda.device_count() < 2 * ranks:
        pytest.skip(f"needs {2 * ranks} CUDA devices")
    model = tersor.LLM(TINY, **OPTIONS)
    wanted = [list(output.outputs[0].token_ids) for output in model.generate(PROMPTS, GREEDY)]
    model.close()
    said: list[str] = []

    async def lost(copies: Copies, number: int) -> None:
        asked = asyncio.create_task(answers(copies))
        while not copies.copies()[number].requests:
            await asyncio.sleep(0.001)
        copies._children._children[number].kill()  # type: ignore[attr-defined]
        with pytest.raises(LostError, match=f"copy {number} of 2 ended by SIGKILL"):
            await asked
        async with asyncio.timeout(300):
            while any(one.state != ANSWERS for one in copies.copies()):
                await asyncio.sleep(0.1)

    load = of_several(str(TINY), None, EngineConfig(**OPTIONS, tensor_parallel=ranks), 2, 0)
    copies = Copies(load, 2, lambda: load_tokenizer(TINY), say=said.append, parents=ranks > 1)
    try:
        assert asyncio.run(answers(copies)) == wanted
        assert all(one.engine.generated_tokens >= 40 for one in copies.copies())
        asyncio.run(lost(copies, 1))
        assert asyncio.run(answers(copies)) == wanted
    finally:
        copies.end()
    assert said[-1] == "copy 1 of 2 answers again" and not multiprocessing.active_children()
