"""Last states of prompts on a GPU: those of the CPU, where graphs are there too, and beside texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import packed_models, tiny_lm

import tersor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTHS = (1, 2, 49, 64, 65, 97, 145, 256)


def test_last_states_are_those_of_the_cpu_alone_and_beside_texts(tmp_path: Path) -> None:
    path = packed_models.compressed(tiny_lm.TINY, tmp_path / "model", format="fp6_e3m2")
    options: dict[str, Any] = {"max_rows": 8, "max_step_tokens": 48, "max_length": 256}
    prompts = [[3 + (7 * row + place) % 90 for place in range(length)] for row, length in enumerate(LENGTHS)]
    model = tersor.LLM(path, device="cuda", dtype="float16", kv_bytes=64 << 20, memory=0.5, **options)
    core, found = model.core, {}
    params = tersor.SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    for row, prompt in enumerate(prompts):
        core.add(f"state {row}", prompt, None)
        if row < 3:
            core.add(f"text {row}", prompt, params)
    while core.unfinished:
        found |= {output.request_id: output for output in core.step(partial=False)}
    assert [len(found[f"text {row}"].outputs[0].token_ids) for row in range(3)] == [9] * 3
    wanted = tersor.LLM(path, device="cpu", dtype="float32", kv_bytes=8 << 20, **options).embed(prompts)
    for row, (alone, output) in enumerate(zip(model.embed(prompts), wanted, strict=True)):
        for state in (alone.outputs.embedding, found[f"state {row}"].embedding):
            assert state is not None and np.abs(state - output.outputs.embedding).max() < 0.01
