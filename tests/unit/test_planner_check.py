"""The checker of plans: a second cost agrees with every plan, and each fault of an edited one is found."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tersor.checkpoint.config import parse_scheme
from tersor.errors import InputError
from tersor.hardware import chip_named
from tersor.models.geometries import GEOMETRIES
from tersor.models.parts import model_of, of_config
from tersor.planner import links
from tersor.planner.asked import Asked
from tersor.planner.check import TOLERANCE, check
from tersor.planner.choose import assembled, plan
from tersor.planner.cost import Kernels
from tersor.planner.made import Made, Pool, Unfit, make
from tersor.planner.mesh import Axes, Mesh
from tersor.planner.parts import Model, Workload
from tersor.planner.plan import Plan
from tersor.planner.problem import Problem
from tersor.planner.search import fast, random
from tersor.planner.searches import search_named

CHIP = chip_named("h200")
KERNELS, LINKS = Kernels(CHIP), links.of_chip(CHIP)


FEW = {**GEOMETRIES["deepseek-v3"], "num_hidden_layers": 5, "n_routed_experts": 16, "n_group": 1, "topk_group": 1}
"""A config.json of DeepSeek-V3 with few layers and experts, and all else."""


def asked(name: str, format: str | None, mesh: str, **options: Any) -> Asked:
    """A question about some H200."""
    scheme = None if format is None else parse_scheme(format, None, None, "format")
    workload = options.pop("workload", Workload(batch=24, context=1024, prompt=200))
    model = of_config(FEW, name, scheme) if name == "few-deepseek" else model_of(name, scheme)
    return Asked(model, Mesh.of(None, mesh, 8), workload, KERNELS, LINKS, **options)


@pytest.mark.parametrize(
    "name, format, mesh, objective",
    [
        ("llama-3-8b", None, "1x1", "latency"),
        ("llama-3-70b", None, "1x8", "latency"),
        ("llama-3-70b", "int4:g128", "2x8", "latency"),
        ("llama-3-70b", "int4:g128", "2x8", "throughput"),
        ("qwen2.5-72b", "int4:g128", "1x5", "latency"),
        ("opt-13b", "fp6_e3m2", "1x3", "latency"),
        ("qwen3-30b-a3b", "fp6_e3m2", "1x7", "latency"),
        ("mixtral-8x7b", None, "4+4", "latency"),
        ("mixtral-8x7b", None, "4+4", "throughput"),
        ("gpt-oss-20b", None, "1x6", "latency"),
        ("few-deepseek", "int4:g128", "4+4", "throughput"),
    ],
)
def test_a_second_cost_agrees_and_every_weight_is_there_once(
    name: str, format: str | None, mesh: str, objective: str
) -> None:
    question = asked(name, format, mesh, objective=objective)
    walked = check(plan(question), question.model, KERNELS, LINKS)
    assert set(walked.passes) == {"decode", "prefill"}


@pytest.mark.parametrize("method", ["random", "rules"])
def test_plans_that_are_not_the_best_are_sound_too(method: str) -> None:
    for mesh in ("1x2", "4+3"):
        question = asked("llama-3-8b", None, mesh, method=method)
        check(plan(question), question.model, KERNELS, LINKS)


def test_every_way_to_deal_out_a_mesh_costs_the_same_when_its_ranks_are_walked() -> None:
    question = asked("qwen3-30b-a3b", "fp6_e3m2", "4+2", workload=Workload(batch=12, context=512, prompt=64))
    pool, seen = Pool(search_named("fast")), 0
    for axes, parts in question.candidates():
        try:
            found = make(question.setting(axes), parts, pool)
        except Unfit:
            continue
        if not isinstance(found, float):
            check(assembled(question, found, 0.0, 0.0, (), ()), question.model, KERNELS, LINKS)
            seen += 1
    assert seen > 10


def test_pages_of_rows_that_are_dealt_out_are_each_on_one_rank() -> None:
    work = Workload(batch=26, context=4096, prompt=200)
    question = asked("mixtral-8x7b", None, "1x4", workload=work, data=1, pipeline=1, tensor=4)
    for parts in (1, 3):
        pool = Pool(lambda problem: fast(by(problem, "attention", "batch")))
        found = make(question.setting(Axes(question.mesh, 1, 1, 4)), parts, pool)
        assert isinstance(found, Made)
        made = assembled(question, found, 0.0, 0.0, (), ())
        check(made, question.model, KERNELS, LINKS)
        (kind,) = question.model.kinds
        rows = {1: 7, 3: 9}[parts]  # micro-batches of nine rows are three for each rank, and there are three of them
        assert {one.kv for one in made.stages[0].memory} == {32 * work.pages_bytes(kind.kv_heads, kind.head_dim, rows)}


def by(problem: Problem, name: str, way: str) -> Problem:
    """The problem in which a block of all layers has one way."""
    blocks = [
        replace(one, seconds=np.where(np.array(one.options) == way, one.seconds, np.inf)) if name in one.name else one
        for one in problem.blocks
    ]
    return replace(problem, blocks=tuple(blocks))


@pytest.mark.parametrize("tensor", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "name, format",
    [("llama-3-8b", "int4:g128"), ("qwen2.5-7b", None), ("few-deepseek", None), ("gpt-oss-20b", None)],
)
def test_whatever_is_drawn_is_sound(name: str, format: str | None, tensor: int) -> None:
    """Choices at random among all that are allowed, in one stage and in two."""
    question = asked(name, format, "1x8" if tensor == 8 else f"2x{tensor}")
    for seed in range(4):
        pool = Pool(lambda problem, seed=seed: random(problem, seed=seed, count=1))  # type: ignore[misc]
        axes = Axes(question.mesh, 1, 1 if tensor == 8 else 2, tensor)
        found = make(question.setting(axes), 1, pool)
        assert isinstance(found, Made)
        check(assembled(question, found, 0.0, 0.0, (), ()), question.model, KERNELS, LINKS)


@pytest.fixture(scope="module")
def sound() -> tuple[Plan, Model]:
    """A plan with two stages, cut weights and a pending sum, and its model."""
    question = asked("llama-3-70b", "int4:g128", "1x8")
    found = plan(question)
    assert found.tensor > 1 and chosen_of(found.to_dict(), "out")["way"] == "row"
    return found, question.model


def edited(found: Plan, change: Callable[[dict[str, Any]], None]) -> Plan:
    """The plan of a file that was changed by hand."""
    raw = json.loads(json.dumps(found.to_dict()))
    change(raw)
    return Plan.from_dict(raw)


def cut_of(raw: dict[str, Any], end: str) -> dict[str, Any]:
    """The cut of the module with this end."""
    return next(cut for cut in raw["cuts"] if cut["module"].endswith(end))


def chosen_of(raw: dict[str, Any], block: str) -> dict[str, Any]:
    """What was chosen for a block in decoding."""
    return next(one for one in raw["chosen"] if one["block"] == block and one["phase"] == "decode")


def _drop_cut(raw: dict[str, Any]) -> None:
    raw["cuts"].remove(cut_of(raw, "o_proj"))


def _drop_slice(raw: dict[str, Any]) -> None:
    cut_of(raw, "o_proj")["slices"].pop()


def _overlap(raw: dict[str, Any]) -> None:
    cut_of(raw, "down_proj")["slices"][1]["columns"][0] -= 128


def _gap(raw: dict[str, Any]) -> None:
    cut_of(raw, "up_proj")["slices"][1]["rows"][0][0] += 64


def _quantum(raw: dict[str, Any]) -> None:
    slices = cut_of(raw, "down_proj")["slices"]
    slices[0]["columns"][1] = slices[1]["columns"][0] = slices[1]["columns"][0] - 64


def _short(raw: dict[str, Any]) -> None:
    cut_of(raw, "down_proj")["slices"][-1]["columns"][1] -= 128


def _mismatch(raw: dict[str, Any]) -> None:
    for end in ("gate_proj", "up_proj"):
        slices = cut_of(raw, end)["slices"]
        slices[0]["rows"][0][1] += 128
        slices[1]["rows"][0][0] += 128


def _half(raw: dict[str, Any]) -> None:
    cut_of(raw, "up_proj")["slices"][0]["rows"] = None


def _foreign(raw: dict[str, Any]) -> None:
    raw["cuts"].append(copy.deepcopy(cut_of(raw, "o_proj")) | {"module": "model.layers.{layer}.else", "layers": [0]})


def _pending(raw: dict[str, Any]) -> None:
    chosen_of(raw, "out")["gives"] = "R"


def _heads(raw: dict[str, Any]) -> None:
    one = chosen_of(raw, "attention")
    one["heads"][0][1] += 1
    one["heads"][1][0] += 1


def _lost_head(raw: dict[str, Any]) -> None:
    chosen_of(raw, "attention")["heads"][-1][1] -= 1


def _unread(raw: dict[str, Any]) -> None:
    for one in raw["chosen"]:
        if one["block"] == "attention":
            one.update(way="replicate", reads="R", gives="R")


def _two_places(raw: dict[str, Any]) -> None:
    chosen_of(raw, "attention").update(way="batch", reads="S", gives="S")


def _uncut(raw: dict[str, Any]) -> None:
    cut_of(raw, "o_proj")["slices"] = [{"rows": None, "columns": None, "experts": None}] * raw["tensor"]


def _way(raw: dict[str, Any]) -> None:
    chosen_of(raw, "out")["way"] = "diagonal"


def _stages(raw: dict[str, Any]) -> None:
    raw["stages"][0]["first"] = 1


def _devices(raw: dict[str, Any]) -> None:
    raw["stages"][0]["devices"][0] = raw["stages"][0]["devices"][1]


def _time(raw: dict[str, Any]) -> None:
    raw["passes"]["decode"] *= 1 + 3 * TOLERANCE


def _bytes(raw: dict[str, Any]) -> None:
    raw["stages"][0]["memory"][0]["weights"] += 1


def _room(raw: dict[str, Any]) -> None:
    raw["stages"][0]["memory"][0]["room"] = 1000


def _experts(raw: dict[str, Any]) -> None:
    raw["expert"] = 7


def _head(raw: dict[str, Any]) -> None:
    raw["stages"][-1]["head"] = False


@pytest.mark.parametrize(
    "change, line",
    [
        (_drop_cut, "the plan has no cut of model.layers.0.self_attn.o_proj"),
        (_drop_slice, "o_proj has slices of"),
        (_overlap, "are on no rank, or on two"),
        (_gap, "rows .* are on no rank, or on two"),
        (_quantum, "columns do not start at whole quanta of 128 channels"),
        (_short, "columns .* are on no rank"),
        (_mismatch, "down reads .* and up gives"),
        (_half, "some ranks have all rows, others a part"),
        (_foreign, "the plan cuts model.layers.{layer}.else, which the model has not"),
        (_pending, "out is cut by row: it reads and gives H and P"),
        (_heads, "rank 0 of layers.0-79 has heads 0 to 17, and out reads"),
        (_lost_head, "the model has 0 to 64, each once"),
        (_unread, "by the plan, and .* by its ranks"),
        (_two_places, "pages have one place, and attention is by batch of layers.0-79, head of layers.0-79"),
        (
            _uncut,
            "out of layers.0-79 is row in decode, and model.layers.{layer}.self_attn.o_proj has no columns of its own",
        ),
        (_way, "has way 'diagonal'"),
        (_stages, "stages have layers 1 to"),
        (_devices, "a device has two places"),
        (_time, "a pass of decode takes"),
        (_bytes, "rank 0 of stage 0 has .* bytes of weights"),
        (_room, "rank 0 of stage 0 lacks"),
        (_experts, "are no whole groups of 7"),
        (_head, "the output head is not on the last stage alone"),
    ],
)
def test_a_fault_is_found(sound: tuple[Plan, Model], change: Callable[[dict[str, Any]], None], line: str) -> None:
    found, model = sound
    check(found, model, KERNELS, LINKS)
    with pytest.raises(InputError, match=line):
        check(edited(found, change), model, KERNELS, LINKS)


def test_a_plan_for_another_model_chip_or_links_is_refused(sound: tuple[Plan, Model]) -> None:
    found, model = sound
    other = model_of("llama-3-8b", parse_scheme("int8", None, None, "format"))
    with pytest.raises(InputError, match=rf"the plan is for model {model.digest} \(llama-3-70b\)"):
        check(found, other, KERNELS, LINKS)
    with pytest.raises(InputError, match="for chip NVIDIA H200, and this is chip NVIDIA H100"):
        check(found, model, Kernels(chip_named("h100")), LINKS)
    with pytest.raises(InputError, match="for links NVIDIA H200, and this is links other"):
        check(found, model, KERNELS, replace(LINKS, label="other"))


@pytest.mark.parametrize(
    "change, line",
    [
        ({"version": 2}, "is version 2 of plans, and this Tersor reads 1"),
        ({"kind": "tersor links"}, "is no plan"),
        ({"step": "long"}, "is no whole plan: 'long' is no float"),
        ({"stages": 3}, "is no whole plan: 3 is no list"),
        ({"colour": 1}, "is no whole plan: has 'colour'"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(sound: tuple[Plan, Model], change: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line):
        Plan.from_dict(sound[0].to_dict() | change)
    raw = sound[0].to_dict()
    raw.pop("cuts")
    with pytest.raises(InputError, match="is no whole plan: lacks 'cuts'"):
        Plan.from_dict(raw)
