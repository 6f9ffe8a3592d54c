"""What the planner finds: Megatron's cuts, experts, vocabularies, stages, and few bits on few GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tersor.checkpoint.config import parse_scheme
from tersor.errors import InputError
from tersor.hardware import chip_named
from tersor.models.geometries import GEOMETRIES
from tersor.models.parts import model_of, of_config
from tersor.models.planned import placed_config
from tersor.planner import links
from tersor.planner.asked import Asked
from tersor.planner.choose import least_seconds, notes, plan
from tersor.planner.cost import Kernels
from tersor.planner.made import Made, Pool, Unfit, make
from tersor.planner.mesh import Axes, Mesh
from tersor.planner.parts import Model, Workload
from tersor.planner.plan import Plan
from tersor.planner.searches import search_named
from tersor.planner.sources import explain

CHIP = chip_named("h200")
KERNELS, LINKS = Kernels(CHIP), links.of_chip(CHIP)
DECODE = Workload(phases=("decode",))
INT4 = "int4:g128"


def model(name: str, format: str | None = None) -> Model:
    """A well-known geometry, plain or in one format."""
    return model_of(name, None if format is None else parse_scheme(format, None, None, "format"))


def asked(of: Model, devices: int, workload: Workload = DECODE, **options: Any) -> Asked:
    """A question about nodes of eight H200."""
    return Asked(of, Mesh.of(devices, None, LINKS.reach), workload, KERNELS, LINKS, **options)


def made(of: Model, pipeline: int, tensor: int, workload: Workload = DECODE, parts: int = 1, data: int = 1) -> Made:
    """The best cuts on one way to deal out as many GPUs as it takes."""
    mesh = Mesh.of(data * pipeline * tensor, None, LINKS.reach)
    question = Asked(of, mesh, workload, KERNELS, LINKS)
    found = make(question.setting(Axes(mesh, data, pipeline, tensor)), parts, Pool(search_named("fast")))
    assert isinstance(found, Made)
    return found


def ways(found: Made, phase: str = "decode") -> dict[str, str]:
    """Block -> way of the first kind of layers, and of what is outside layers."""
    first = found.setting.model.kinds[0].name
    return {
        place.block: found.replica.way(found.choice, name).name
        for name, place in found.replica.places.items()
        if place.phase.name == phase and place.group in (first, place.block)
    }


@pytest.mark.parametrize("tensor", range(2, 9))
@pytest.mark.parametrize("name", ["llama-3-70b", "opt-30b"])
def test_cuts_of_llama_and_gpt_are_megatrons(name: str, tensor: int) -> None:
    found = ways(made(model(name), 1, tensor))
    assert {block: found[block] for block in ("qkv", "attention", "out", "gate_up", "down", "head")} == {
        "qkv": "column",
        "attention": "head",
        "out": "row",
        "gate_up": "column",
        "down": "row",
        "head": "vocabulary",
    }


def test_a_large_vocabulary_is_cut_and_one_gpu_cuts_nothing() -> None:
    assert ways(made(model("gpt-oss-20b"), 1, 4))["head"] == "vocabulary"
    assert set(ways(made(model("llama-3-8b"), 1, 1)).values()) == {"replicate"}


def test_experts_are_dealt_out_where_a_share_of_each_would_be_thin_and_cut_where_few_have_much() -> None:
    deep = made(model("deepseek-v3", "fp8_e4m3"), 2, 8, replace(DECODE, batch=32))
    chosen = [one for name, one in deep.choice.items() if name.endswith("experts")]
    names = {deep.replica.places[name].ways[deep.choice[name]].name for name in deep.choice if "experts" in name}
    assert chosen and names == {"expert"}
    assert ways(made(model("mixtral-8x7b"), 1, 2))["experts"] == "tensor"


def test_experts_of_several_replicas_fit_where_those_of_one_do_not() -> None:
    found = plan(asked(model("deepseek-v3", "fp8_e4m3"), 16, replace(DECODE, batch=8), objective="throughput"))
    assert found.expert > 1 and found.data > 1
    with pytest.raises(Unfit):
        made(model("deepseek-v3", "fp8_e4m3"), 1, 4)


def test_sequence_parallel_comes_with_long_prompts_and_not_with_short_ones() -> None:
    def norm(prompt: int) -> str:
        workload = Workload(context=8192, prompt=prompt, phases=("prefill",))
        return ways(made(model("llama-3-70b"), 1, 8, workload), "prefill")["ffn_norm"]

    found = [norm(prompt) for prompt in (8, 32, 2048, 8192)]
    assert found[:2] == ["replicate"] * 2 and found[2:] == ["sequence"] * 2


def test_stages_leave_room_for_the_embedding_and_the_head() -> None:
    found = made(model("llama-3-8b"), 4, 1, replace(DECODE, batch=4), parts=4)
    sizes = [end - start for start, end in zip(found.starts, [*found.starts[1:], 32], strict=True)]
    assert sum(sizes) == 32 and sizes[-1] == min(sizes) < max(sizes)
    uneven = made(model("llama-3-8b"), 5, 1, replace(DECODE, batch=5), parts=5)
    assert len(uneven.starts) == 5


def test_few_bits_want_few_gpus_for_each_replica() -> None:
    """The table of the 70B at 64 rows and 2048 tokens: TP2 is the least for 16 bits, and TP1 the best for 4."""
    found = {
        format: plan(asked(model("llama-3-70b", format), 8, objective="throughput"))
        for format in (None, "fp8_e4m3", INT4)
    }
    assert [(one.data, one.pipeline, one.tensor) for one in found.values()] == [(4, 1, 2), (8, 1, 1), (8, 1, 1)]
    rates = [one.rate for one in found.values()]
    assert rates == sorted(rates)
    fastest = {format: plan(asked(model("llama-3-70b", format), 8)) for format in (None, INT4)}
    assert fastest[None].tensor == 8 and fastest[INT4].tensor < 8


def test_keys_and_values_are_repeated_where_ranks_are_more_than_their_heads() -> None:
    four, eight = (made(model("qwen2.5-7b"), 1, tensor) for tensor in (4, 8))
    assert eight.memory[0][0].kv == four.memory[0][0].kv  # 4 heads of keys and values
    assert ways(eight)["attention"] == "head"


def test_rows_are_dealt_out_where_ranks_are_many_more_than_heads_of_keys_and_texts_are_long() -> None:
    """Attention by rows reads each page once; heads that two ranks have are read twice. The engine has heads alone."""
    work = Workload(batch=256, context=8192, prompt=512)
    question = replace(asked(model("qwen3-30b-a3b"), 8, work), data=1, tensor=8)
    free, own = plan(question), plan(replace(question, served=True))
    short = plan(replace(question, workload=Workload(batch=8, context=512, prompt=64)))
    assert [{one.way for one in found.chosen if one.block == "attention"} for found in (free, own, short)] == [
        {"batch"},
        {"head"},
        {"head"},
    ]
    assert free.stages[0].memory[0].kv < own.stages[0].memory[0].kv and free.step < own.step
    assert free.notes[-1].startswith("the engine does not run this plan")


def test_231_groups_are_cut_into_116_and_115() -> None:
    found = plan(asked(model("qwen2.5-72b", INT4), 2))
    assert found.tensor == 2
    down = next(cut for cut in found.cuts if cut.module.endswith("down_proj"))
    assert [one.columns for one in down.slices] == [(0, 116 * 128), (116 * 128, 231 * 128)]
    assert down.quantum == 128 and down.way == "row"


def small(**fields: Any) -> dict[str, Any]:
    """A config.json of two layers."""
    return {**GEOMETRIES["llama-2-7b"], "num_hidden_layers": 2, **fields}


def test_what_no_quantum_allows_is_replicated_and_said() -> None:
    raw = small(intermediate_size=256)
    found = made(of_config(raw, "small", parse_scheme(INT4, None, None, "f")), 1, 4)
    assert ways(found)["down"] != "row"
    (note,) = notes(found.setting)
    assert "model.layers.0.mlp.down_proj: 256 in units of 128 are 2 shares, and there are 4 ranks" in note


def test_a_mesh_that_cannot_hold_the_model_says_what_is_missing_of_a_rank() -> None:
    with pytest.raises(InputError, match=r"no plan fits: .* of a rank lack \d+\.\d GB .* 148\.4 GB of NVIDIA H200"):
        plan(asked(model("llama-3.1-405b"), 2))
    with pytest.raises(InputError, match=r"1x1|DP1 PP1 TP1 cannot hold llama-3-70b"):
        plan(asked(model("llama-3-70b"), 1))


def test_sizes_that_are_no_powers_of_two_and_unequal_nodes_are_planned() -> None:
    assert plan(asked(model("llama-3-70b"), 6)).tensor in (3, 5, 6)
    mesh = Mesh.of(12, None, 8)
    assert mesh.nodes == (8, 4)
    found = plan(replace(asked(model("llama-3-70b"), 12), objective="throughput"))
    assert found.data * found.tensor * found.pipeline + found.idle == 12


def test_phases_share_the_place_of_weights_but_not_of_activations() -> None:
    workload = Workload(batch=16, context=4096, prompt=4000)
    found = made(model("llama-3-70b"), 1, 8, workload)
    decode, prefill = ways(found), ways(found, "prefill")
    assert decode["norm"] == "replicate" and prefill["norm"] == "sequence"
    for name, place in found.replica.places.items():
        if place.phase.name == "decode":
            other = found.replica.way(found.choice, name.replace("decode.", "prefill.", 1))
            assert found.replica.way(found.choice, name).held == other.held
    question = plan(asked(model("llama-3-70b", INT4), 8, Workload()))
    assert all(question.apart[name] <= question.passes[name] * (1 + 1e-12) for name in question.passes)


@pytest.mark.parametrize("name, format", [("llama-3-8b", None), ("qwen3-30b-a3b", "fp6_e3m2"), ("opt-13b", None)])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_no_way_to_deal_out_the_gpus_is_better_than_the_plan(name: str, format: str | None, objective: str) -> None:
    question = asked(model(name, format), 6, Workload(batch=24, context=1024, prompt=256), objective=objective)
    best = plan(question)
    value = best.step if objective == "latency" else best.devices / best.rate
    pool, seen = Pool(search_named("fast")), 0
    for axes, parts in question.candidates():
        try:
            found = make(question.setting(axes), parts, pool)
        except Unfit:
            continue
        assert isinstance(found, Made)
        seen += 1
        assert found.value(objective) >= value * (1 - 1e-12)
        assert found.value(objective) >= best.bound * (1 - 1e-12)
        assert least_seconds(question.setting(axes), parts) <= found.step * (1 + 1e-12)
        assert found.bound <= found.step * (1 + 1e-12)
    assert seen > 12 and best.bound <= value


def test_no_rule_is_better_and_every_rule_is_in_the_plan() -> None:
    own = (("layers.*.self_attn.q_proj", "colwise"), ("layers.*.self_attn.o_proj", "rowwise"))
    question = asked(replace(model("llama-3-70b"), own_plan=own), 8, Workload())
    found = plan(question)
    assert [rule.name for rule in found.rules] == ["all tensor", "redco", "model's own", "bytes only"]
    assert all(rule.seconds is None or rule.seconds >= found.step * (1 - 1e-12) for rule in found.rules)
    assert {rule.axes for rule in found.rules} >= {"DP1 PP1 TP8", "DP4 PP1 TP2"}
    drawn = plan(replace(question, method="random"))
    ruled = plan(replace(question, method="rules"))
    assert found.step <= drawn.step * (1 + 1e-12) and found.step <= ruled.step * (1 + 1e-12)
    assert ruled.bound == 0 and drawn.gap > 0


def test_a_runner_up_says_what_it_reads_and_what_it_waits_for() -> None:
    found = plan(asked(model("llama-3-70b", INT4), 8))
    tp8 = next(one for one in found.rivals if one.axes == "DP1 PP1 TP8")
    assert "reads and multiplies weights for" in tp8.why and "but waits for sums for" in tp8.why


def test_a_plan_is_the_same_after_its_file_and_each_time() -> None:
    found = plan(asked(model("gpt-oss-20b"), 4, Workload()))
    again = Plan.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    twice = plan(asked(model("gpt-oss-20b"), 4, Workload()))
    assert replace(twice, searched=0.0) == replace(found, searched=0.0)


def test_every_part_of_the_time_has_a_source_and_parts_are_the_whole() -> None:
    found = plan(asked(model("qwen3-30b-a3b", "fp6_e3m2"), 8, Workload()))
    assert all(part.source for part in found.times)
    for name, seconds in found.passes.items():
        total = sum(part.seconds for part in found.times if part.name.startswith(f"{name}."))
        assert total == pytest.approx(seconds, rel=1e-9)
    (one,) = explain(found, "decode.layers.0-47.experts")
    assert "(48 x " in one.value and "kernels.tune for NVIDIA H200" in one.source
    assert {one.kind for one in explain(found, "sums")} == {"sums"}
    sizes = {one.name: one for one in explain(found, "memory")}
    assert sizes["memory.stage 0.weights"].value == f"{found.stages[0].memory[0].weights / 1e9:.3f} GB"
    every = {one.name: one for one in explain(found, "")}
    assert all(one.source for one in every.values())
    asked_for = [f"weights.{cut.module}" for cut in found.cuts] + [f"other.{one.name}" for one in found.rivals]
    asked_for += [f"rule.{one.name}" for one in found.rules if one.seconds is not None] + ["gap", "rate", "searched"]
    asked_for += [f"{name} {what}" for name in found.passes for what in ("pass", "apart", "stage 0")]
    assert set(asked_for) - set(every) <= {f"other.{one.name}" for one in found.rivals if one.seconds is None}
    assert every["decode stage 0"].value == f"{found.stages[0].seconds['decode'] * 1e3:.3f} ms"
    assert "prefill" in explain(found, "step")[0].source
    with pytest.raises(InputError, match=r"the plan has no part 'nothing': it has decode\.embedding, "):
        explain(found, "nothing")


def test_time_grows_with_the_kinds_of_layers_and_not_with_devices() -> None:
    few, many = (plan(asked(model("llama-3-70b"), count, objective="throughput")) for count in (8, 16384))
    assert few.tensor == many.tensor and many.devices == 16384
    assert many.searched < 10


def test_every_rank_of_thousands_would_load_the_slices_of_its_plan() -> None:
    """Without a process: what `models.share` says of each rank of a replica is held against the plan."""
    scheme = parse_scheme(INT4, None, None, "f")
    question = replace(asked(model("llama-3-70b", INT4), 16384, Workload()), served=True)
    found = plan(question)
    placement = placed_config(found, GEOMETRIES["llama-3-70b"], "llama-3-70b", scheme)
    assert placement.data * placement.ranks + found.idle == 16384 and placement.ranks > 100
    wide = replace(question, mesh=Mesh((8,) * 2), pipeline=2, tensor=8)
    two = plan(wide)
    ways = [replace(cut, slices=cut.slices[::-1]) if cut.module.endswith("up_proj") else cut for cut in two.cuts]
    with pytest.raises(InputError, match="rank 0 of layer 0: down reads"):
        placed_config(replace(two, cuts=tuple(ways)), GEOMETRIES["llama-3-70b"], "llama-3-70b", scheme)


def test_layers_that_all_differ_are_planned_too() -> None:
    """Two phases of forty kinds: few blocks may be under way at once."""
    of = model("llama-3-8b")
    (kind,) = of.kinds
    kinds = tuple(replace(kind, layers=(layer,), window=100 + layer) for layer in range(40))
    found = plan(asked(replace(of, kinds=kinds), 4, Workload(batch=8)))
    assert len({one.group for one in found.chosen if one.block == "qkv"}) == 40
    assert found.searched < 60


def test_every_search_is_held_to_the_fast_one() -> None:
    question = asked(of_config(small(), "small"), 2, Workload(batch=8, context=512, prompt=64))
    fast = plan(question)
    full, learned = (plan(replace(question, method=name)) for name in ("full", "dqn"))
    assert full.step == pytest.approx(fast.step, rel=1e-9) and full.bound <= full.step
    assert fast.step * (1 - 1e-12) <= learned.step < 1.05 * fast.step
    assert "HiGHS" in full.method and "DQN" in learned.method


@pytest.mark.parametrize(
    "options, line",
    [
        ({"objective": "speed"}, "objective 'speed': latency or throughput"),
        ({"method": "fasst"}, "no search 'fasst', did you mean 'fast'"),
    ],
)
def test_what_is_not_there_is_said(options: dict[str, str], line: str) -> None:
    with pytest.raises(InputError, match=line):
        plan(asked(model("llama-3-8b"), 2, **options))
