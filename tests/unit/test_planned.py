"""Plans that are executed: what a plan says of a rank is what it loads, and answers are those of one device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models, plans, tiny_lm
from helpers.asked import OPTIONS, answers
from helpers.ranks import ranks_of

import tersor
from tersor import models
from tersor.checkpoint.source import open_source
from tersor.cli.main import run
from tersor.convert import quantize
from tersor.engine import workers
from tersor.errors import InputError
from tersor.hardware import chip_named
from tersor.models.parts import model_of
from tersor.models.planned import placed
from tersor.planner import links
from tersor.planner.asked import Asked
from tersor.planner.choose import plan
from tersor.planner.cost import Kernels
from tersor.planner.made import Made, Pool, Unfit, make
from tersor.planner.mesh import Mesh
from tersor.planner.parts import Workload
from tersor.planner.placement import Placement
from tersor.planner.plan import Cut, Plan, Slice, read
from tersor.planner.searches import search_named
from tersor.planner.served import WAYS, why_not

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, plain": ("llama", {}, {}),
    "llama, groups": ("llama", {"format": "int4", "group_size": 32}, {"intermediate_size": 160}),
    "mixtral, plain": ("mixtral", {}, {}),
    "qwen3_moe, thin experts": (
        "qwen3_moe", {"format": "fp6_e3m2"},
        {"moe_intermediate_size": 32, "num_experts": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}  # fmt: skip
AXES: list[dict[str, int]] = [
    {"tensor": 2},
    {"tensor": 3},
    {"tensor": 4},
    {"pipeline": 3},
    {"tensor": 2, "pipeline": 2},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models of three layers, each made once."""
    made: dict[str, Path] = {}

    def of(case: str) -> Path:
        if case not in made:
            name, options, changes = CASES[case]
            changes = {"num_hidden_layers": 3, "max_position_embeddings": 256, "head_dim": 32, **changes}
            folder = tmp_path_factory.mktemp("model")
            found = packed_models.plain(name, folder / "plain", **changes)
            made[case] = packed_models.compressed(found, folder / "packed", **options) if options else found
        return made[case]

    return of


def placement_of(found: Plan, path: Path) -> Placement:
    """The placement that a plan asks for."""
    with open_source(path) as source:
        return placed(found, source)


def loaded(path: Path, placement: Placement, rank: int) -> int:
    """Bytes that a rank loads; the float32 copy of a norm, which products of one rank take, is made afterwards."""
    place = placement.place(rank)
    ranks = ranks_of(place.stage.ranks)[place.rank]
    decoder = models.load(path, "cpu", torch.bfloat16, ranks=ranks, place=place)
    return sum({one.data_ptr(): one.nbytes for one in decoder.tensors() if one.dtype != torch.float32}.values())


def ways(found: Plan) -> dict[str, str]:
    """Block -> way."""
    return {one.block: one.way for one in found.chosen}


@pytest.mark.parametrize("axes", AXES, ids=lambda axes: " ".join(f"{name} {count}" for name, count in axes.items()))
@pytest.mark.parametrize("case", CASES)
def test_a_rank_loads_the_bytes_that_the_plan_says(
    checkpoint: Callable[[str], Path], case: str, axes: dict[str, int], tmp_path: Path
) -> None:
    path, devices = checkpoint(case), axes.get("tensor", 1) * axes.get("pipeline", 1)
    found = plans.planned(path, devices, tmp_path, data=1, **axes)
    placement = placement_of(found, path)
    assert [stage.layers for stage in placement.stages] == [(stage.first, stage.last) for stage in found.stages]
    if found.tensor > 1:
        assert ways(found)["attention"] == "head" and all("heads" in stage.cuts for stage in placement.stages)
    for rank in range(placement.ranks):
        place = placement.place(rank)
        assert loaded(path, placement, rank) == found.stages[place.index].memory[place.rank].weights


def test_experts_are_placed_as_they_are_dealt_out_and_cut_where_they_are_cut(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("mixtral, plain")
    (stage,) = placement_of(plans.planned(path, 3, tmp_path, data=1, tensor=3), path).stages
    assert stage.expert_groups == 1 and stage.cuts["expert_channels"] == (0, 32, 64, 96)
    monkeypatch.setitem(WAYS, "experts", ("expert",))
    path = checkpoint("qwen3_moe, thin experts")
    found = plans.planned(path, 3, tmp_path, data=1, tensor=3)
    placement = placement_of(found, path)
    assert placement.stages[0].expert_groups == 3 and placement.stages[0].cuts["experts"] == (0, 6, 11, 16)
    assert [loaded(path, placement, rank) for rank in range(3)] == [one.weights for one in found.stages[0].memory]


def test_copies_of_a_plan_are_those_of_its_placement(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint("llama, plain")
    found = plans.planned(path, 4, tmp_path, data=2, tensor=2)
    assert (found.data, found.idle) == (2, 0) and placement_of(found, path).data == 2
    few = plans.planned(path, 4, tmp_path, data=1, tensor=3)
    assert (few.data, few.idle) == (1, 1)
    with pytest.raises(InputError, match=r"^no way to deal out 4 devices .* with 3 copies, 2 ranks of a stage$"):
        plans.planned(path, 4, tmp_path, data=3, tensor=2)


GEOMETRIES = ["llama-3-8b", "opt-13b", "gpt-oss-20b", "qwen3-30b-a3b"]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_search_for_the_engine_finds_the_best_plan_that_the_engine_runs(name: str) -> None:
    chip = chip_named("h200")
    prices, work = links.of_chip(chip), Workload(batch=24, context=2048, prompt=1024)
    asked = Asked(model_of(name), Mesh.of(4, None, 8), work, Kernels(chip), prices, served=True)
    best, free = plan(asked), plan(replace(asked, served=False))
    assert why_not(best) is None and why_not(free) is not None
    assert free.step <= best.step < 1.1 * free.step
    pool, seen = Pool(search_named("fast")), 0
    for axes, parts in asked.candidates():
        try:
            found = make(asked.setting(axes), parts, pool)
        except Unfit:
            continue
        assert isinstance(found, Made) and found.step >= best.step * (1 - 1e-12)
        seen += 1
    assert seen > 4


def test_what_the_engine_does_not_run_is_a_note_of_the_plan_and_a_line(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint("llama, plain")
    found = plans.planned(path, 2, tmp_path, data=1, tensor=2)
    assert why_not(found) is None and not found.notes

    def changed(**blocks: str) -> Plan:
        return replace(found, chosen=tuple(replace(one, way=blocks.get(one.block, one.way)) for one in found.chosen))

    for wrong, line in (
        (changed(norm="sequence"), "norm of layers.0-2 is cut by sequence in decode"),
        (changed(down="column"), "down of layers.0-2 is cut by column in decode"),
        (changed(qkv="replicate"), "in a layer qkv is replicate, attention is head, out is row"),
        (changed(embedding="replicate"), "embedding is replicate and head vocabulary on the same ranks"),
        (replace(found, expert=2), "experts of a layer are dealt out over 2 replicas"),
        (replace(found, pipeline=3), "a decode step goes through 3 stages in 1 parts, and the engine makes 3"),
    ):
        with pytest.raises(InputError, match=f"^the engine does not run this plan: {line}"):
            placement_of(wrong, path)
    qkv = next(one for one in found.chosen if one.block == "qkv")
    two = replace(found, chosen=(*found.chosen, replace(qkv, group="layers.3", way="replicate")))
    assert why_not(two) == "qkv of layers.3 is replicate in decode, and that of layers.0-2 column in decode"


@pytest.mark.parametrize(("batch", "stages", "parts"), [(64, 2, 2), (3, 4, 3), (1, 4, 1)])
def test_a_plan_for_the_engine_has_the_micro_batches_that_the_engine_makes(batch: int, stages: int, parts: int) -> None:
    chip = chip_named("h200")
    work = Workload(batch=batch, context=512, prompt=128)
    asked = Asked(model_of("llama-3-8b"), Mesh.of(stages, None, 8), work, Kernels(chip), links.of_chip(chip))
    pinned = replace(asked, pipeline=stages, served=True)
    assert plan(pinned).parts == parts and why_not(plan(pinned)) is None
    assert {parts for axes, parts in replace(pinned, served=False).candidates()} == {1, parts}


def moved(found: Plan, *names: str) -> Plan:
    """The plan with inner channels of some weights cut at 40 of 96."""
    changed = []
    for cut in found.cuts:
        if cut.module.endswith(names):
            spans = (0, 40), (40, 96)
            rows = cut.slices[0].rows is not None
            slices = (Slice(rows=(span,)) if rows else Slice(columns=span) for span in spans)
            cut = replace(cut, slices=tuple(slices))
        changed.append(cut)
    return replace(found, cuts=tuple(changed))


def beside(cut: Cut) -> Cut:
    """The cut with forty rows on the first rank, and the rest on the second."""
    rows = cut.slices[-1].rows
    assert rows is not None
    return replace(cut, slices=(Slice(rows=((0, 40),)), Slice(rows=((40, rows[-1][1]),))))


def test_a_plan_that_was_changed_by_hand_runs_as_it_says_or_not_at_all(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint("llama, plain")
    found = plans.planned(path, 2, tmp_path, data=1, tensor=2)
    (stage,) = placement_of(moved(found, "gate_proj", "up_proj", "down_proj"), path).stages
    assert stage.cuts["channels"] == (0, 40, 96)
    for wrong, line in (
        (moved(found, "down_proj"), r"rank 0 of layer 0: down reads \(0, 40\), and up gives \(0, 48\)"),
        (moved(found, "up_proj"), r"rank 0 of layer 0: down reads \(0, 48\), and up gives \(0, 40\)"),
        (
            replace(found, cuts=tuple(cut if cut.module != "lm_head" else beside(cut) for cut in found.cuts)),
            r"rank 0 of stage 0 has rows \(\(0, 40\),\) and columns None of lm_head, and would load \(\(0, ",
        ),
        (replace(found, cuts=found.cuts[1:]), "embed_tokens"),
        (replace(found, stages=found.stages * 2), "the plan has 2 stages, and 1 pipeline ranks"),
        (replace(found, chosen=found.chosen[:3]), "."),
    ):
        with pytest.raises(InputError, match=line):
            placement_of(wrong, path)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, plain and in FP6."""
    folder = tmp_path_factory.mktemp("bundled")
    quantize(tiny_lm.TINY, folder / "fp6")
    return {"plain": tiny_lm.TINY, "fp6": folder / "fp6"}


def written(path: Path, folder: Path, *words: str) -> Path:
    """Have `tersor plan` write a plan for H200 whose links are fast, so that all is cut."""
    fast, out = plans.fast_links(folder / "links.json"), folder / "plan.json"
    given = ["--chip", "h200", "--links", str(fast), "--copies", "1", "-o", str(out)]
    assert run(["plan", str(path), *given, *words]) == 0
    return out


@pytest.mark.parametrize(
    ("form", "devices", "tensor", "pipeline"), [("plain", 2, 2, 1), ("plain", 2, 1, 2), ("fp6", 4, 2, 2)]
)
def test_a_plan_runs_in_processes_and_answers_as_one_device(
    bundled: dict[str, Path], form: str, devices: int, tensor: int, pipeline: int, tmp_path: Path
) -> None:
    path = bundled[form]
    words = ["--devices", devices, "--tensor-parallel", tensor, "--pipeline-parallel", pipeline]
    file = written(path, tmp_path, *map(str, words))
    found = read(file)
    assert (found.tensor, found.pipeline, found.data) == (tensor, pipeline, 1)
    assert (ways(found)["attention"], ways(found)["down"]) == (("head", "row") if tensor > 1 else ("replicate",) * 2)
    wanted = answers(tersor.LLM(path, **OPTIONS))
    model = tersor.LLM(path, plan=file, **OPTIONS)
    try:
        assert model.config.ranks == devices
        for (tokens, values), (others, numbers) in zip(answers(model), wanted, strict=True):
            assert tokens == others and values == pytest.approx(numbers, abs=1e-5)
    finally:
        model.close()


def test_a_mixed_plan_in_bfloat16_rounds_sums_in_another_order_and_no_more(
    bundled: dict[str, Path], tmp_path: Path
) -> None:
    path = bundled["plain"]
    file = written(path, tmp_path, "--devices", "4", "--tensor-parallel", "2", "--pipeline-parallel", "2")
    wanted = answers(tersor.LLM(path, dtype="bfloat16", **OPTIONS))
    model = tersor.LLM(path, plan=file, dtype="bfloat16", **OPTIONS)
    try:
        for (tokens, values), (others, numbers) in zip(answers(model), wanted, strict=True):
            alike = next((at for at, pair in enumerate(zip(tokens, others, strict=True)) if len({*pair}) > 1), None)
            assert alike is None or alike > 0  # where two tokens are as good texts may part
            assert values[:alike] == pytest.approx(numbers[:alike], abs=0.15)  # a few of a logit's steps
    finally:
        model.close()


def test_torchrun_runs_a_tensor_plan_as_one_device_runs_it(bundled: dict[str, Path], tmp_path: Path) -> None:
    path = bundled["fp6"]
    file = written(path, tmp_path, "--devices", "2", "--tensor-parallel", "2")
    tests, sources = Path(__file__).resolve().parents[1], Path(tersor.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{sources}:{tests}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tersor"]
    asked = ["generate", str(path), "--prompt", "The first rule", "-n", "12", "--device", "cpu"]
    done = subprocess.run(
        [*torchrun, "run", str(file), *asked], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (wanted,) = tersor.LLM(path, **OPTIONS).generate(
        ["The first rule"], tersor.SamplingParams(max_tokens=12, temperature=0)
    )
    assert done.stdout.strip("\n") == wanted.outputs[0].text.strip("\n")


def test_batches_run_the_copies_of_a_plan(
    bundled: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersor.server import batch

    path = bundled["plain"]
    out = tmp_path / "plan.json"
    words = ["--devices", "6", "--chip", "h200", "--copies", "3", "--pipeline-parallel", "2", "-o", str(out)]
    assert run(["plan", str(path), *words]) == 0
    seen: list[Any] = []

    def answer(*given: Any, **options: Any) -> Any:
        seen.extend(given)
        raise InputError("seen")

    monkeypatch.setattr(batch, "answer_file", answer)
    verb = ["batch", "--model", str(path), "-i", "a.jsonl", "-o", "b.jsonl", "--device", "cpu", "--plan", str(out)]
    assert run(verb) == 2
    config, options = seen[3:5]
    assert options.data_parallel == 3 and config.ranks == 2 and config.placement.data == 1
    assert run([*verb, "--data-parallel", "2"]) == 2


@pytest.fixture
def one_rank(bundled: dict[str, Path], tmp_path: Path) -> Path:
    """A plan of one rank of the bundled model."""
    out = tmp_path / "plan.json"
    assert run(["plan", str(bundled["plain"]), "--devices", "1", "--chip", "h200", "-o", str(out)]) == 0
    return out


VERBS = (
    ["generate", "{model}", "--prompt", "a", "--device", "cpu"],
    ["serve", "{model}", "--device", "cpu"],
    ["batch", "--model", "{model}", "-i", "a.jsonl", "-o", "b.jsonl", "--device", "cpu"],
)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_a_plan_of_another_model_or_version_is_refused_before_a_weight_is_read(
    bundled: dict[str, Path], one_rank: Path, verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(workers, "_Children", None)
    words = [one.format(model=bundled["fp6"]) for one in verb]
    capsys.readouterr()

    def refused(*more: str) -> str:
        assert run([*words, *more]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and not captured.out
        return str(captured.err)

    own, other = read(one_rank).digest, model_of(str(bundled["fp6"])).digest
    assert refused("--plan", str(one_rank)) == f"tersor: the plan is for model {own} (tiny-lm), and fp6 is {other}\n"
    assert "--plan and --placement both say who has what" in refused("--plan", str(one_rank), "--placement", "a.json")
    raw = json.loads(one_rank.read_text(encoding="utf-8"))
    one_rank.write_text(json.dumps(raw | {"version": 9}), encoding="utf-8")
    assert "is version 9 of plans, and this Tersor reads 1" in refused("--plan", str(one_rank))


def test_a_plan_and_a_placement_are_one_too_many_in_python(bundled: dict[str, Path], one_rank: Path) -> None:
    with pytest.raises(InputError, match="a plan and a placement both say who has what"):
        tersor.LLM(bundled["plain"], plan=one_rank, placement=Placement.even(4), **OPTIONS)


def test_decode_steps_are_timed_by_a_plan_of_the_geometry(tmp_path: Path, capsys: Any) -> None:
    from tersor.cli import bench_latency

    out = tmp_path / "plan.json"
    words = ["--format", "fp6_e3m2", "--devices", "2", "--chip", "h200", "--copies", "1", "--tensor-parallel", "2"]
    assert run(["plan", "llama-3-8b", *words, "-o", str(out)]) == 0
    found = bench_latency.placement_of(["llama-3-8b"], ["fp6_e3m2"], None, None, out)
    assert isinstance(found, Placement) and found.ranks == 2 and "heads" in found.stages[0].cuts
    with pytest.raises(InputError, match=r"^the plan is for model .* \(llama-3-8b\), and llama-3-8b is "):
        bench_latency.placement_of(["llama-3-8b"], ["int8"], None, None, out)
    with pytest.raises(InputError, match="--plan is of one model"):
        bench_latency.placement_of(["llama-3-8b", "llama-2-7b"], ["fp6_e3m2"], None, None, out)
    capsys.readouterr()
    assert run(["bench", "latency", "llama-3-8b", "--format", "fp6_e3m2", "--plan", str(out)]) == 2
    assert "the placement is of 2 ranks: start them all, torchrun --nproc-per-node 2" in capsys.readouterr().err


def test_a_verb_that_runs_no_plan_is_refused_and_options_go_to_the_verb(one_rank: Path, capsys: Any) -> None:
    capsys.readouterr()
    assert run(["run", str(one_rank), "servee", "x"]) == 2
    assert "no verb 'servee' runs a plan, did you mean 'serve'" in capsys.readouterr().err
    for words in (["serve", "--help"], ["bench", "latency", "--help"]):
        assert run(["run", str(one_rank), *words]) == 0
        assert re.search(rf"Usage: tersor {' '.join(words[:-1])} ", capsys.readouterr().out)
