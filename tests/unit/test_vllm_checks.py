"""What vLLM's main process says before a worker starts: of a checkpoint, of ranks, of options, in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import checkpoints, mixes, packed_models, vllm_stand_in
from helpers.vllm_layers import HIDDEN, INNER, LAYER, config_of
from safetensors.torch import save_file

from tersor.convert import quantize
from tersor.errors import TersorError, UnsupportedError
from tersor.integrations import vllm as plugin

pytestmark = pytest.mark.usefixtures("one_vllm_rank")

LOADING = SimpleNamespace(load_format="dummy")
OFFLOADING = SimpleNamespace(uva=SimpleNamespace(cpu_offload_gb=4.0), prefetch=SimpleNamespace(offload_group_size=0))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of 64 hidden and 96 inner channels."""
    return packed_models.case("llama", tmp_path_factory.mktemp("dense"), {}).packed


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a mixture of experts of 64 inner channels."""
    return packed_models.case("qwen3_moe", tmp_path_factory.mktemp("moe"), {}, moe_intermediate_size=HIDDEN).packed


def test_ranks_that_cut_a_weight_inside_of_a_quantum_are_refused(packed: Path) -> None:
    config = config_of(packed)
    vllm_stand_in.VllmConfig(config, tensor=1)
    line = rf"{LAYER}.mlp.down_proj: tensor parallelism gives a rank input channels 48 to 96, .* of 32: use fewer"
    with pytest.raises(UnsupportedError, match=line):
        vllm_stand_in.VllmConfig(config, tensor=2)


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"tensor": 2}, ""),
        (
            {"tensor": 4, "enable_expert_parallel": True},
            r"o_proj: .* input channels 16 to 32",
        ),
        ({"tensor": 2, "data": 2}, r"experts.0.down_proj: .* input channels 16 to 32"),
        ({"tensor": 2, "enable_expert_parallel": True}, ""),
        ({"data": 2, "enable_expert_parallel": True}, "packed experts do not run where ranks exchange tokens"),
        ({"tensor": 2, "enable_expert_parallel": True, "enable_eplb": True}, "leave --enable-eplb out"),
    ],
)
def test_experts_are_cut_by_ranks_of_tensors_and_of_data_but_not_by_those_of_experts(
    mixture: Path, told: dict[str, Any], line: str
) -> None:
    config = config_of(mixture)
    if not line:
        vllm_stand_in.VllmConfig(config, **told)
        return
    with pytest.raises(UnsupportedError, match=line):
        vllm_stand_in.VllmConfig(config, **told)


@pytest.mark.parametrize(
    ("told", "option"),
    [({"lora_config": object()}, "--enable-lora"), ({"offload_config": OFFLOADING}, "--cpu-offload-gb")],
)
def test_options_that_move_or_add_to_weights_are_refused(packed: Path, told: dict[str, Any], option: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{option} does not work with packed weights"):
        vllm_stand_in.VllmConfig(config_of(packed), **told)


@pytest.mark.parametrize(
    ("capability", "has"), [((8, 0), "8.0"), ((10, 0), "10.0"), ((12, 0), "12.0"), ((9, 0), ""), (None, "")]
)
def test_a_gpu_that_has_no_kernel_with_8_bit_activations_is_refused(
    packed: Path, capability: tuple[int, int] | None, has: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_stand_in.CURRENT, "capability", capability)
    vllm_stand_in.VllmConfig(config_of(packed))
    monkeypatch.setenv("TERSOR_VLLM_ACTIVATIONS", "fp8")
    config = config_of(packed)
    if not has:
        vllm_stand_in.VllmConfig(config)
        return
    line = rf"^activations fp8 of TERSOR_VLLM_ACTIVATIONS: .* 9\.0, this GPU has {re.escape(has)}: leave them 16bit$"
    with pytest.raises(UnsupportedError, match=line):
        vllm_stand_in.VllmConfig(config)


def test_random_weights_of_a_mixed_checkpoint_are_refused(tmp_path: Path, packed: Path) -> None:
    vllm_stand_in.VllmConfig(config_of(packed), load_config=LOADING)
    mixed = config_of(mixes.compressed("llama", tmp_path, intermediate_size=INNER)[1])
    with pytest.raises(UnsupportedError, match="random weights have one scheme"):
        vllm_stand_in.VllmConfig(mixed, load_config=LOADING)


def test_what_vllm_runs_without_tersor_is_not_looked_at() -> None:
    plugin.register()  # a second time
    vllm_stand_in.VllmConfig(None, tensor=2, lora_config=object())
    vllm_stand_in.VllmConfig(vllm_stand_in.QuantizationConfig(), tensor=2, lora_config=object())


@pytest.mark.parametrize(
    ("embedding", "head", "refused"),
    [("quant_config=quant_config", "quant_config=quant_config", ""), ("", "**options", "embedding"), ("x", "", "head")],
)
def test_embeddings_and_heads_that_vllm_builds_without_a_method_stay_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedding: str, head: str, refused: str
) -> None:
    (tmp_path / "of_vllm.py").write_text(
        f"raise ImportError('nobody imports it')\nVocabParallelEmbedding(96, 64, {embedding})\n"
        f"ParallelLMHead(96, 64, {head})\n".replace(", x)", ", quant_config=None)")
    )
    monkeypatch.syspath_prepend(tmp_path)
    known = {"LlamaForCausalLM": SimpleNamespace(module_name="of_vllm")}
    monkeypatch.setattr(vllm_stand_in.REGISTRY, "models", known)
    overrides = {"embed_tokens": "int8", "lm_head": "int8"}
    packed = packed_models.case("llama", tmp_path / "packed", {"overrides": overrides}).packed
    if not refused:
        assert config_of(packed).plan.embeddings
        return
    line = rf"is packed, and vLLM builds the {refused} of LlamaForCausalLM for plain weights alone: leave it out"
    with pytest.raises(UnsupportedError, match=line):
        config_of(packed)
    config_of(packed_models.case("llama", tmp_path / "other", {}).packed)


@pytest.mark.parametrize(
    ("name", "options", "changes", "line"),
    [
        ("gpt_oss", {}, {"swiglu_limit": 5.0}, "experts of a layer, and no gate and up that kernels take"),
        (
            "gpt_oss",
            {"ignore": ["down_proj"]},
            {},
            r"packed experts have gate, up and down, and these \['gate_",
        ),
        ("granitemoe", {"ignore": ["down_proj"]}, {}, r"packed experts have gate, up and down, and these \['gate_"),
        ("llama4_text", {"format": "uint4", "group_size": 32}, {"num_experts_per_tok": 1}, "alone"),
        ("llama4_text", {}, {}, "the router's weights come before the product, of several experts a token"),
        (
            "qwen3_moe",
            {},
            {"hidden_act": "relu"},
            "experts do not run here: gate and up become one by relu",
        ),
        ("qwen3_moe", {}, {"swiglu_limits": [0, 7.0]}, "gate and up are clamped"),
        ("qwen3_moe", {"overrides": {"gate_proj": "int8"}}, {}, "stored in another format than .*gate_proj"),
        ("qwen3_moe", {"overrides": {r"experts\.1\.": "int8"}}, {}, "is stored in another format than"),
        ("qwen3_moe", {"ignore": [r"experts\.1\.up_proj"]}, {}, r"experts.1.up_proj is plain beside packed experts"),
        ("qwen3_moe", {"ignore": ["up_proj"]}, {}, r"packed experts have gate, up and down, and these \['down_proj', "),
    ],
)
def test_weights_that_layers_of_vllm_cannot_hold_are_refused_by_their_headers(
    tmp_path: Path, name: str, options: dict[str, Any], changes: dict[str, Any], line: str
) -> None:
    source = packed_models.plain(name, tmp_path / "plain", intermediate_size=HIDDEN, **changes)
    quantize(source, tmp_path / "out", **options)
    with pytest.raises(UnsupportedError, match=line):
        config_of(tmp_path / "out")


def test_rows_that_vllm_brings_in_another_order_are_dense(tmp_path: Path) -> None:
    falcon = packed_models.case("falcon", tmp_path / "falcon", {}).packed
    assert config_of(falcon).plan.architecture == "FalconForCausalLM"
    mixed = mixes.compressed("falcon", tmp_path / "mixed")[1]
    with pytest.raises(UnsupportedError, match=r"query_key_value: vLLM brings its rows in another order"):
        config_of(mixed)


def test_no_line_is_a_value_error_which_pydantic_would_wrap_in_lines_of_its_own(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = shutil.copytree(packed, tmp_path / "newer")
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (newer / "config.json").write_text(json.dumps(config))
    lost = shutil.copytree(packed, tmp_path / "lost")
    (lost / "model.safetensors").write_bytes(b"nothing")
    for directory, line in ((newer, "version 99"), (lost, "model.safetensors")):
        with pytest.raises(TersorError, match=line) as refused:
            config_of(directory)
        assert not isinstance(refused.value, ValueError) and "\n" not in str(refused.value)
    monkeypatch.setenv("TERSOR_VLLM_ACTIVATIONS", "fp3")
    with pytest.raises(TersorError, match="fp3") as refused:
        config_of(packed)
    assert not isinstance(refused.value, ValueError)


def test_a_checkpoint_that_lost_a_tensor_is_refused_by_its_headers(tmp_path: Path) -> None:
    packed = packed_models.case("llama", tmp_path, {"outliers": "3%"}).packed
    file = packed / "model.safetensors"
    tensors = checkpoints.weights(packed)
    del tensors[f"{LAYER}.mlp.down_proj.weight_outliers"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(Exception, match=r"down_proj.weight_outliers is missing"):
        config_of(packed)
