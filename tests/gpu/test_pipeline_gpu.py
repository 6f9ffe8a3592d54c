"""Models in stages and in groups of experts on several GPUs: answers are those of one GPU, with graphs and without."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models, plans, tiny_lm
from helpers.asked import lost

import tersor
from tersor.engine.config import EngineConfig

COUNT = 2
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < COUNT, reason="needs two CUDA devices")
PROMPTS = [[5, 6, 7], list(range(20, 90)), [30, 27], [40], [8] * 12, [9, 60, 61]]
PARAMS = tersor.SamplingParams(max_tokens=24, temperature=0, logprobs=0, ignore_eos=True)
OPTIONS: dict[str, Any] = {"device": "cuda", "dtype": "float16", "kv_bytes": 1 << 26, "max_rows": 8}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "two stages": {"pipeline_parallel": 2},
    "two groups of experts": {"expert_parallel": 2},
    "two stages of two": {"pipeline_parallel": 2, "expert_parallel": 2},
    "stages of one and of three": {
        "placement": {"stages": [{"layers": [0, 1]}, {"layers": [1, 3], "ranks": 3, "expert_groups": 3}]}
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers with experts in FP6."""
    changes = {"num_hidden_layers": 3, "max_position_embeddings": 256, "head_dim": 32}
    made = packed_models.case("mixtral", tmp_path_factory.mktemp("model"), {"format": "fp6_e3m2"}, **changes).packed
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_lm.TINY / name, made)
    return made


def same(found: list[tersor.RequestOutput], wanted: list[tersor.RequestOutput]) -> None:
    """Hold that texts agree until two tokens are as good: sums are rounded in another order, and steps have others."""
    for one, other in zip(found, wanted, strict=True):
        mine, theirs = one.outputs[0], other.outputs[0]
        assert mine.logprobs is not None and theirs.logprobs is not None
        equal = 0
        while equal < len(mine.token_ids) and mine.token_ids[equal] == theirs.token_ids[equal]:
            equal += 1
        assert equal >= 4
        for place in range(equal):
            token = mine.token_ids[place]
            pair = mine.logprobs[place][token].logprob, theirs.logprobs[place][token].logprob
            assert pair[0] == pytest.approx(pair[1], abs=0.05)


@pytest.mark.parametrize("graphs", [None, False])
@pytest.mark.parametrize("case", PLACEMENTS)
def test_gpus_answer_as_one(path: Path, case: str, graphs: bool | None) -> None:
    how = PLACEMENTS[case]
    ranks = EngineConfig(**how).ranks
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    one = tersor.LLM(path, cuda_graph=graphs, **OPTIONS)
    alone = one.generate(PROMPTS, PARAMS)
    model = tersor.LLM(path, cuda_graph=graphs, **how, **OPTIONS)
    try:
        assert bool(model.runner.graphs) == bool(one.runner.graphs)
        for _ in range(3):
            same(model.generate(PROMPTS, PARAMS), alone)
        sampled = tersor.SamplingParams(
            max_tokens=12, temperature=0.8, seed=3, frequency_penalty=0.5, prompt_logprobs=1
        )
        assert all(one.outputs[0].token_ids for one in model.generate(PROMPTS, sampled))
        assert len(model.embed(PROMPTS)) == len(PROMPTS)
    finally:
        model.close()
    assert not multiprocessing.active_children()


def test_stages_of_a_dense_model_are_graphs(tmp_path: Path) -> None:
    path = packed_models.compressed(tiny_lm.TINY, tmp_path / "packed", format="fp6_e3m2")
    alone = tersor.LLM(path, cuda_graph=True, **OPTIONS).generate(PROMPTS, PARAMS)
    model = tersor.LLM(path, cuda_graph=True, pipeline_parallel=COUNT, **OPTIONS)
    try:
        assert len(model.runner.graphs) > 1 and len(model.runner.decoder.layers) == 2
        for _ in range(3):
            same(model.generate(PROMPTS, PARAMS), alone)
    finally:
        model.close()


def test_a_stage_that_dies_ends_all_with_a_line(path: Path) -> None:
    model = tersor.LLM(path, pipeline_parallel=COUNT, **OPTIONS)
    try:
        model.generate(PROMPTS, PARAMS)
        lost(lambda: model.generate(PROMPTS, PARAMS))
    finally:
        model.close()


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}])
def test_gpus_of_a_plan_answer_as_one(path: Path, axes: dict[str, int], tmp_path: Path) -> None:
    count = axes.get("tensor", 1) * axes.get("pipeline", 1)
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA devices")
    file = tmp_path / "plan.json"
    plans.planned(path, count, tmp_path, data=1, **axes).save(file)
    one = tersor.LLM(path, **OPTIONS)
    alone = one.generate(PROMPTS, PARAMS)
    model = tersor.LLM(path, plan=file, **OPTIONS)
    try:
        same(model.generate(PROMPTS, PARAMS), alone)
    finally:
        model.close()
