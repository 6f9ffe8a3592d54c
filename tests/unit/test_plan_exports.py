"""Plans as settings of other systems: transformers runs its own and answers alike, and what cannot be said is said."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
import transformers
from helpers import forced_plans, transformers_ranks
from helpers.fakes import FakeGpu
from transformers.distributed import DistributedConfig

import tersor
from tersor.cli.main import run
from tersor.errors import InputError
from tersor.integrations.plans import SYSTEMS, exported
from tersor.integrations.plans.limits import layers_of
from tersor.integrations.transformers.plan_settings import tp_plan
from tersor.models.geometries import GEOMETRIES
from tersor.models.parts import model_of, of_config
from tersor.planner.parts import Model, Workload
from tersor.planner.plan import Plan, Slice, Stage
from tersor.planner.rules import MEGATRON

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny-lm"
FEW = {"num_hidden_layers": 2}
EXPERTS = {**MEGATRON, "experts": "expert"}
MIXTURE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "moe_intermediate_size": 256, "intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 97,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, whatever the machine."""
    FakeGpu().install(monkeypatch)


def few(name: str, **options: int) -> Model:
    """A well-known model with two layers."""
    config = {**GEOMETRIES[name], **FEW, **options}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:2]
    return of_config(config, name, None)


def settings_of(text: str) -> dict[str, Any]:
    """What a file of settings for transformers defines."""
    found: dict[str, Any] = {}
    exec(text, found)
    return found


def answers(ranks: int, *pairs: tuple[Path, Path]) -> list[dict[str, Any]]:
    """What ranks that torchrun starts say of models under settings."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    tests, sources = Path(__file__).resolve().parents[1], Path(tersor.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{sources}:{tests}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [*command, str(Path(transformers_ranks.__file__)), *(str(path) for pair in pairs for path in pair)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def test_transformers_in_two_processes_answers_as_in_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    experts = tmp_path / "experts"
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MIXTURE)).save_pretrained(experts)
    cases = (
        (TINY, MEGATRON),
        (TINY, {"gate_up": "column", "down": "row"}),
        (TINY, {**MEGATRON, "out": "column", "down": "column"}),
        (experts, MEGATRON),
        (experts, EXPERTS),
    )
    pairs = []
    for number, (path, ways) in enumerate(cases):
        pairs.append((path, tmp_path / f"{number}.py"))
        pairs[-1][1].write_text(
            exported(forced_plans.forced(model_of(str(path), None), "1x2", 2, ways), "transformers")
        )
    said = [settings_of(file.read_text(encoding="utf-8"))["distributed_config"] for _, file in pairs]
    assert [one.ep_size for one in said] == [1, 1, 1, 1, 2]
    found = answers(2, *pairs)
    assert [one["query"] for one in found] == [[128, 256], [256, 256], [128, 256], [16, 32], [16, 32]]
    for one in found:
        assert one["far"] < 1e-5 and one["same"], one


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama-3-8b", {}),
        ("qwen2.5-7b", {}),
        ("opt-6.7b", {}),
        ("mixtral-8x7b", {}),
        ("qwen3-30b-a3b", {}),
        ("gpt-oss-20b", {}),
        ("deepseek-v3", {"num_hidden_layers": 5}),
    ],
)
def test_every_rule_names_a_module_and_a_style_that_transformers_has(name: str, options: dict[str, int]) -> None:
    model = few(name, **options)
    plan = forced_plans.forced(model, "1x2", 2, workload=Workload(batch=2, context=128, prompt=32))
    rules, _ = tp_plan(plan)
    config = transformers.AutoConfig.for_model(
        **{"model_type": _kind(model.architecture), **GEOMETRIES[name], **FEW, **options, **_layers(name)}
    )
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(config)
    resolved, _, _ = whole._resolve_parallel_plans(DistributedConfig(tp_size=2, tp_plan=rules))
    names = {re.sub(r"\.\d+\.", ".*.", name) for name in resolved}
    assert {key for key, style in rules.items() if style != "replicate"} <= names
    for key, style in (type(config).base_model_tp_plan or {}).items():  # Megatron's cuts are transformers' own
        if f"model.{key}" in rules and style != "replicated_with_grad_allreduce":
            assert rules[f"model.{key}"] == style, key


def _kind(architecture: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return next(kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == architecture)


def _layers(name: str) -> dict[str, Any]:
    types = GEOMETRIES[name].get("layer_types")
    return {"layer_types": types[:2]} if types else {}


def test_heads_that_even_channels_would_part_are_gathered() -> None:
    rules, said = tp_plan(forced_plans.forced(few("llama-3-8b"), "1x3", 3))
    assert rules["model.layers.*.self_attn.q_proj"] == "colwise_gather_output"
    assert rules["model.layers.*.self_attn.o_proj"] == "rowwise_split_input"
    assert rules["model.layers.*.mlp.gate_proj"] == "colwise"
    assert any("attention is whole on every rank" in one for one in said)


def test_rules_that_transformers_does_not_ship_are_said_to_be_untried() -> None:
    said = {
        name: "\n".join(tp_plan(forced_plans.forced(few(name), "1x2", 2))[1]) for name in ("llama-3-8b", "gpt-oss-20b")
    }
    assert "ships no rule" not in said["llama-3-8b"]
    assert "no rule for experts of GptOssForCausalLM: every rank has all of them" in said["gpt-oss-20b"]
    assert "no rule for model.layers.*.self_attn.q_proj, " in said["gpt-oss-20b"]


def test_what_stays_whole_is_said_where_transformers_would_cut_it() -> None:
    rules, _ = tp_plan(forced_plans.forced(few("llama-3-8b"), "1x2", 2, {"gate_up": "column", "down": "row"}))
    assert rules["model.embed_tokens"] == rules["lm_head"] == rules["model.layers.*.self_attn.q_proj"] == "replicate"


def command_of(text: str) -> tuple[dict[str, str], list[str], list[str]]:
    """The variables and words of a command, and the comments above it."""
    comments = [line for line in text.splitlines() if line.startswith("#")]
    words = shlex.split("\n".join(line for line in text.splitlines() if not line.startswith("#")))
    variables = dict(word.split("=", 1) for word in words if "=" in word.partition("-")[0])
    return variables, words[len(variables) :], comments


def option(words: list[str], name: str) -> str | None:
    """The value of an option, or nothing."""
    return words[words.index(name) + 1] if name in words else None


def staged(plan: Plan, layers: tuple[int, ...], parts: int) -> Plan:
    """The plan with stages of so many layers."""
    ends = [sum(layers[: number + 1]) for number in range(len(layers))]
    first = plan.stages[0]
    stages: tuple[Stage, ...] = tuple(
        replace(first, first=end - own, last=end) for end, own in zip(ends, layers, strict=True)
    )
    return replace(plan, stages=stages, pipeline=len(layers), parts=parts)


@pytest.fixture(scope="module")
def dense() -> Plan:
    """Two replicas of two ranks."""
    return forced_plans.forced(
        model_of("llama-3-8b", None), "1x4", 2, workload=Workload(batch=6, context=512, prompt=32, kv_bytes=1)
    )


@pytest.fixture(scope="module")
def mixture() -> Plan:
    """Four replicas of one rank, of which pairs have experts together."""
    found = forced_plans.forced(few("qwen3-30b-a3b"), "1x4", 1, EXPERTS)
    return replace(found, expert=2)


def test_flags_of_servers_are_the_axes(dense: Plan) -> None:
    _, words, _ = command_of(exported(dense, "vllm"))
    assert words[:3] == ["vllm", "serve", "llama-3-8b"]
    names = ("--tensor-parallel-size", "--data-parallel-size", "--max-num-seqs", "--max-model-len", "--kv-cache-dtype")
    assert [option(words, name) for name in names] == ["2", "2", "6", "512", "fp8"]
    _, words, _ = command_of(exported(dense, "sglang"))
    names = ("--tp-size", "--dp-size", "--max-running-requests", "--context-length", "--kv-cache-dtype", "--ep-size")
    assert [option(words, name) for name in names] == ["2", "2", "6", "512", "fp8_e4m3", None]


def test_replicas_that_have_experts_together_are_one_command(mixture: Plan) -> None:
    _, words, comments = command_of(exported(mixture, "vllm"))
    assert option(words, "--data-parallel-size") == "2" and "--enable-expert-parallel" in words
    assert "2 such commands run side by side, each on 2 GPUs of its own" in comments[1]
    _, words, _ = command_of(exported(mixture, "sglang"))
    names = ("--tp-size", "--attn-dp-size", "--ep-size", "--dp-size", "--max-running-requests")
    assert [option(words, name) for name in names] == ["2", "2", "2", "2", "8"]
    section = tomllib.loads(exported(mixture, "torchtitan"))["parallelism"]
    assert section["data_parallel_replicate_degree"] == 2 and section["expert_parallel_degree"] == 2
    assert section["data_parallel_shard_degree"] == 2


def test_replicas_of_a_mixture_with_all_experts_each_are_commands_of_their_own() -> None:
    found = forced_plans.forced(few("qwen3-30b-a3b"), "1x4", 2)
    _, words, comments = command_of(exported(found, "vllm"))
    assert option(words, "--data-parallel-size") is None and "2 such commands" in comments[1]


def test_layers_of_stages_are_given_where_they_can_be(dense: Plan) -> None:
    plan = staged(replace(dense, data=1), (20, 12), 2)
    assert layers_of(plan) == [20, 12]
    variables, words, _ = command_of(exported(plan, "vllm"))
    assert variables == {"VLLM_PP_LAYER_PARTITION": "20,12"} and option(words, "--pipeline-parallel-size") == "2"
    variables, words, _ = command_of(exported(plan, "sglang"))
    assert variables == {"SGLANG_PP_LAYER_PARTITION": "20,12"} and option(words, "--pp-size") == "2"
    text = exported(plan, "transformers")
    assert settings_of(text)["distributed_config"].pp_size == 2
    assert "stages of 20, 12 layers: transformers makes them 16, 16" in text
    assert "sends a batch through its stages as one; the plan counts 2 micro-batches" in text
    section = tomllib.loads(exported(plan, "torchtitan"))["parallelism"]
    assert section["pipeline_parallel_first_stage_less_layers"] == 0
    assert section["pipeline_parallel_last_stage_less_layers"] == 8


@pytest.mark.parametrize("system", ["vllm", "sglang", "torchtitan"])
def test_what_a_system_cannot_be_told_is_said(system: str) -> None:
    three = forced_plans.forced(
        few("llama-3-8b"), "1x3", 3, {**MEGATRON, "head": "replicate", "embedding": "replicate"}
    )
    text = exported(three, system)
    widths = [sum(last - first for first, last in one.rows or ()) for one in three.cuts[1].slices]
    assert len(set(widths)) > 1 and three.cuts[1].module.endswith("q_proj")
    words = f"unequal slices of model.layers.{{layer}}.self_attn.q_proj ({', '.join(map(str, widths))})"
    assert words in text
    assert "the plan leaves whole on every rank: embedding, head" in text
    if system != "torchtitan":
        assert "does not start: it wants as many query heads on every rank, and 32 heads are not" in text


def test_a_plan_that_can_be_said_says_so(mixture: Plan) -> None:
    assert "# They say all of it." in exported(replace(mixture, expert=1, data=1), "vllm")


def test_another_layout_for_prompts_is_said(dense: Plan) -> None:
    own = tuple(
        replace(one, way="sequence") if (one.phase, one.block) == ("prefill", "ffn_norm") else one
        for one in dense.chosen
    )
    assert "the plan has another one for prefill: layers.0-31 ffn_norm by sequence" in exported(
        replace(dense, chosen=own), "vllm"
    )


def test_layers_that_are_cut_otherwise_than_others_are_said(dense: Plan) -> None:
    cuts = []
    for cut in dense.cuts:
        if cut.module.endswith("q_proj"):
            cuts.append(replace(cut, layers=tuple(range(30))))
            cuts.append(replace(cut, layers=(30, 31), slices=(Slice(), Slice()), way="replicate"))
        else:
            cuts.append(cut)
    rules, said = tp_plan(replace(dense, cuts=tuple(cuts)))
    assert rules["model.layers.*.self_attn.q_proj"] == "colwise"
    assert any("colwise in 30 layers, replicate in 2 layers" in one for one in said)


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_export_is_printed_or_written(system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "llama-3-8b", "--devices", "2", "--chip", "h200", "--export", system]
    assert run(words) == 0
    printed = capsys.readouterr().out
    target = tmp_path / "settings"
    assert run([*words, "-o", str(target)]) == 0
    captured = capsys.readouterr()
    assert target.read_text(encoding="utf-8") == printed and not captured.out and f"wrote {target}" in captured.err


def test_bad_exports_are_one_line(dense: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no export for 'vlm', did you mean 'vllm'"):
        exported(dense, "vlm")
    with pytest.raises(InputError, match="does not say which block a weight belongs to"):
        exported(replace(dense, cuts=tuple(replace(cut, block="") for cut in dense.cuts)), "vllm")
    words = ["plan", "llama-3-8b", "--devices", "2", "--chip", "h200", "--export", "vllm", "--json"]
    assert run(words) == 2
    assert "--export prints settings: give it without --json and --explain" in capsys.readouterr().err
    assert run([*words[:-2], "vlm", "-o", str(tmp_path / "x")]) == 2
    assert not list(tmp_path.iterdir())
