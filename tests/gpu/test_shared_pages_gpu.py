"""Answers of an engine whose rows read the pages that they share together, in graphs and beside prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models, tiny_lm
from helpers.sharing import eager_costs

import tersor
from tersor.engine import runner as runners
from tersor.engine.captured import Captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_answers_are_those_of_rows_that_read_for_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: str
) -> None:
    path = packed_models.compressed(tiny_lm.TINY, tmp_path / "model", format="fp6_e3m2")
    options: dict[str, Any] = {"dtype": "float16", "kv_dtype": kv_dtype, "kv_bytes": 256 << 20, "memory": 0.5}
    model = tersor.LLM(path, device="cuda", max_rows=40, max_step_tokens=300, max_length=400, **options)
    runner: Any = model.core.runner
    assert set(runner.sharing) == {size for size in runner.graphs if size >= runners.LEAST_ROWS}
    assert runner.costs.rows > 1
    replayed: list[bool] = []
    replay = Captured.replay
    monkeypatch.setattr(Captured, "replay", lambda one, to: (replayed.append(one.layout.shares), replay(one, to))[1])
    prefixes = [[3 + (7 * number + place * (number + 2)) % 90 for place in range(210)] for number in range(3)]
    prompts = [[*prefixes[row % 3][: 210 - 70 * (row % 2)], row + 3] for row in range(36)]
    prompts += [[5, row + 3] for row in range(3)]
    params = tersor.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    found = []
    for costs in (None, eager_costs(runner.costs.rows, runner.costs.kv_heads)):
        runner.costs = costs
        replayed.clear()
        found.append([output.outputs[0].token_ids for output in model.generate(prompts, params)])
        assert any(replayed) == (costs is not None)
    # Sums are added in another order: of two tokens as good as each other, another may come first, and others after it.
    apart, together = (torch.tensor(tokens) for tokens in found)
    assert (apart == together)[:, :3].float().mean() > 0.95 and (apart == together).float().mean() > 0.8
    model.close()
