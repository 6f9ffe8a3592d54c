"""Models in stages, whose ranks are threads: answers are those of one device, whatever is asked and however cut."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models, pipelines, tiny_lm
from helpers.asked import OPTIONS, PROMPTS, answers

import tersor
from tersor.bench import latency
from tersor.engine import build, memory, scheduler
from tersor.engine.config import EngineConfig
from tersor.engine.runner import Runner
from tersor.engine.step_buffer import Layout
from tersor.ops.attention_form import PAGE
from tersor.planner.placement import Placement, Stage


def made(name: str, folder: Path, options: dict[str, Any], **changes: Any) -> Path:
    """Return a compressed model of three layers with a tokenizer."""
    changes = {"num_hidden_layers": 3, "max_position_embeddings": 256, **changes}
    path = packed_models.case(name, folder, options, **changes).packed
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_lm.TINY / file, path)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a packed embedding, which is its head, and groups that no three ranks share evenly."""
    options: dict[str, Any] = {"format": "int4", "group_size": 32, "overrides": ["embed_tokens=int8:g64"]}
    changes = {"tie_word_embeddings": True, "head_dim": 32, "intermediate_size": 160}
    return made("llama", tmp_path_factory.mktemp("dense"), options, **changes)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts."""
    return made("mixtral", tmp_path_factory.mktemp("sparse"), {"format": "fp6_e3m2"}, head_dim=32)


def same(found: list[Any], wanted: list[Any]) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    for (_, values), (_, others) in zip(found, wanted, strict=True):
        assert values == pytest.approx(others, abs=1e-5)


UNEVEN = {"channels": (0, 64, 96, 160), "vocabulary": (0, 10, 20, 96)}
DENSE = {
    "two uneven stages": Placement.even(3, pipeline=2),
    "a stage a layer": Placement.even(3, pipeline=3),
    "two stages of two": Placement.even(3, pipeline=2, tensor=2),
    "stages of one rank and of three": Placement((Stage(layers=(0, 1)), Stage(layers=(1, 3), ranks=3))),
    "uneven cuts, then one rank": Placement(
        (Stage(layers=(0, 2), ranks=3, cuts=UNEVEN, whole=("heads",)), Stage(layers=(2, 3)))
    ),
}
SPARSE = {
    "experts in two groups": Placement.even(3, expert=2),
    "stages of experts in groups": Placement.even(3, pipeline=2, expert=2),
    "experts in uneven groups, behind a stage of one": Placement(
        (Stage(layers=(0, 1)), Stage(layers=(1, 3), ranks=2, expert_groups=2, cuts={"experts": (0, 3, 4)}))
    ),
}


@pytest.mark.parametrize("case", DENSE)
def test_stages_answer_as_one_device(dense: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answers(tersor.LLM(dense, **OPTIONS))
    with pipelines.model(dense, monkeypatch, DENSE[case], **OPTIONS) as model:
        for _ in range(2):
            same(answers(model), wanted)


@pytest.mark.parametrize("case", SPARSE)
def test_experts_in_groups_answer_as_one_device(sparse: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answers(tersor.LLM(sparse, **OPTIONS))
    with pipelines.model(sparse, monkeypatch, SPARSE[case], **OPTIONS) as model:
        same(answers(model), wanted)


def test_as_many_steps_as_stages_are_under_way_and_rows_are_dealt_out(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5 + number, 6, 7] for number in range(6)]
    params = tersor.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    options = {**OPTIONS, "prefix_caching": False}
    wanted = tersor.LLM(dense, **options).generate(prompts, params)
    with pipelines.model(dense, monkeypatch, Placement.even(3, pipeline=3), **options) as model:
        launch, launched = model.runner.launch, []

        def seen(step: Any, masks: Any = None) -> Any:
            launched.append((len(model.core.scheduler.steps), len(step.rows)))
            return launch(step, masks)

        monkeypatch.setattr(model.runner, "launch", seen)
        found = model.generate(prompts, params)
    assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in wanted]
    assert max(under_way for under_way, _ in launched) == 4  # three, and the one that is launched
    assert launched[8:24] == [(4, 2)] * 16


@pytest.mark.parametrize("case", ["two uneven stages", "uneven cuts, then one rank"])
def test_requests_that_lose_their_pages_and_come_back_draw_the_same(
    dense: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(3)
    prompts = [[draw.randrange(5, 90) for _ in range(draw.randrange(40, 60))] for _ in range(6)]
    params = [
        tersor.SamplingParams(
            max_tokens=draw.randrange(20, 40), temperature=draw.choice((0, 0.8)), seed=number, ignore_eos=True
        )
        for number in range(6)
    ]
    wanted = [one.outputs[0].token_ids for one in tersor.LLM(dense, **OPTIONS).generate(prompts, params)]
    monkeypatch.setattr(scheduler, "growth", lambda request, pages: 0)  # all are let in, whatever they will need
    with pipelines.model(dense, monkeypatch, DENSE[case], **{**OPTIONS, "kv_bytes": 9 << 16}) as model:
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            model.core.add(str(number), prompt, one)
        found = {}
        while model.core.unfinished:
            model.core.scheduler.audit()
            found.update({one.request_id: one.outputs[0].token_ids for one in model.core.step(partial=False)})
        assert model.core.scheduler.preemptions
    assert [found[str(number)] for number in range(6)] == wanted


def test_texts_of_a_grammar_are_drawn_where_the_last_stage_is(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xgrammar")
    params = tersor.SamplingParams(max_tokens=12, temperature=0, grammar={"regex": "[ab]{6}"})
    prompts = [[5, 6, 7], [40, 41]]
    wanted = [one.outputs[0].token_ids for one in tersor.LLM(dense, **OPTIONS).generate(prompts, params)]
    with pipelines.model(dense, monkeypatch, DENSE["a stage a layer"], **OPTIONS) as model:
        assert [one.outputs[0].token_ids for one in model.generate(prompts, params)] == wanted


class Replayed:
    """A captured step that runs its decode each time, into the same memory, as a graph does."""

    def __init__(self, runner: Runner, rows: int) -> None:
        self.layout = Layout(rows, rows, -(-runner.max_length // PAGE))
        self.buffer = torch.zeros(self.layout.size, dtype=torch.int32)
        self.given = None if runner.stages.first else runner._given(rows)
        self.slots, self.runner = self.layout.split(self.buffer)["slots"], runner
        self.made = torch.empty(0)

    @torch.inference_mode()
    def replay(self, staged: torch.Tensor) -> torch.Tensor:
        self.buffer.copy_(staged)
        made = self.runner._decode(self.layout.split(self.buffer), self.layout.rows, self.given)
        self.made = made if self.made.shape != made.shape else self.made.copy_(made)
        return self.made


@pytest.mark.parametrize("case", ["a stage a layer", "two stages of two"])
def test_stages_whose_steps_are_graphs_answer_as_one_device(
    dense: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_graphs(runner: Runner, config: EngineConfig) -> int:
        pages = memory.make_pages(runner, config)
        runner.graphs = {rows: Replayed(runner, rows) for rows in (1, 2, 4, 8)}  # type: ignore[misc]
        return pages

    wanted = answers(tersor.LLM(dense, **OPTIONS))
    params = tersor.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    longer = [one.outputs[0].token_ids for one in tersor.LLM(dense, **OPTIONS).generate(PROMPTS, params)]
    monkeypatch.setattr(build, "make_pages", with_graphs)
    with pipelines.model(dense, monkeypatch, DENSE[case], **OPTIONS) as model:
        same(answers(model), wanted)
        replays, whole = [], Replayed.replay
        monkeypatch.setattr(Replayed, "replay", lambda self, staged: replays.append(1) or whole(self, staged))
        assert [one.outputs[0].token_ids for one in model.generate(PROMPTS, params)] == longer
    assert len(replays) > 20


def test_steps_of_stages_are_timed_as_many_under_way(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pipelines.model(dense, monkeypatch, Placement.even(3, pipeline=2), **OPTIONS) as model:
        (row,) = latency.measure(model.runner, "tiny", "int4", [3], [70], steps=3)
        assert row.milliseconds > 0 and row.weight_bytes is not None
        assert row.weight_bytes < sum(one.nbytes for one in model.runner.decoder.tensors())
    made = latency.result([row], placement=Placement.even(3, pipeline=2).to_dict(), read_bandwidth=None)
    assert latency.RANKS_METHOD in made["method"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("format", ["fp6_e2m3", None])
def test_the_bundled_model_draws_the_same_greedy_tokens_in_stages(
    tmp_path: Path, dtype: str, format: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_lm.TINY if format is None else packed_models.compressed(tiny_lm.TINY, tmp_path / "made", format=format)
    prompts = ["The first rule", "def read_file(path):", "a", "Of all that"]
    params = tersor.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    options = {**OPTIONS, "dtype": dtype, "kv_bytes": 1 << 24}
    wanted = [one.outputs[0].token_ids for one in tersor.LLM(path, **options).generate(prompts, params)]
    ranks = 1 if dtype == "bfloat16" else 2  # sums in another order may part bfloat16 texts
    placement = Placement((Stage(layers=(0, 3)), Stage(layers=(3, 4), ranks=ranks)))
    with pipelines.model(path, monkeypatch, placement, **options) as model:
        assert [one.outputs[0].token_ids for one in model.generate(prompts, params)] == wanted
