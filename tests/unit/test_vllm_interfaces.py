"""An installed vLLM has the names and arguments that the plug-in and its stand-in take for granted.

Read from its files, which nothing imports: a wheel that was unpacked into a folder of PYTHONPATH will do.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from helpers import vllm_stand_in

from tersor.integrations.vllm import register

PACKAGE = importlib.util.find_spec("vllm")
needs_vllm = pytest.mark.skipif(PACKAGE is None, reason="vLLM is not installed: pip install 'tersor[vllm]'")

ARGUMENTS = {
    ("model_executor.layers.quantization.base_config", "QuantizationConfig.maybe_update_config"): (
        "model_name hf_config revision"
    ),
    ("model_executor.layers.quantization.base_config", "QuantizationConfig.get_quant_method"): "layer prefix",
    ("model_executor.layers.quantization.base_config", "QuantizationConfig.apply_vllm_mapper"): "hf_to_vllm_mapper",
    ("model_executor.layers.quantization.base_config", "QuantizeMethodBase.tie_weights"): "layer embed_tokens",
    ("model_executor.layers.linear", "LinearMethodBase.create_weights"): (
        "layer input_size_per_partition output_partition_sizes input_size output_size params_dtype"
    ),
    ("model_executor.layers.linear", "LinearMethodBase.apply"): "layer x bias",
    ("model_executor.layers.fused_moe.fused_moe_method_base", "FusedMoEMethodBase.create_weights"): (
        "layer num_experts hidden_size intermediate_size_per_partition params_dtype"
    ),
    ("model_executor.layers.fused_moe.fused_moe_method_base", "FusedMoEMethodBase.apply"): (
        "layer x topk_weights topk_ids shared_experts shared_experts_input"
    ),
    ("model_executor.layers.fused_moe.routed_experts", "RoutedExperts.weight_loader"): (
        "param loaded_weight weight_name shard_id expert_id return_success"
    ),
    ("model_executor.layers.fused_moe.routed_experts", "RoutedExperts._map_global_expert_id_to_local_expert_id"): (
        "expert_id"
    ),
    ("model_executor.models.utils", "WeightsMapper.apply_list"): "values",
    ("model_executor.models.utils", "WeightsMapper.apply"): "weights",
    ("model_executor.models.utils", "WeightsMapper.__or__"): "other",
    ("model_executor.layers.quantization.base_config", "QuantizationConfig.get_cache_scale_mapper"): "",
    ("model_executor.layers.quantization.base_config", "QuantizationConfig.override_quantization_method"): (
        "hf_quant_cfg user_quant hf_config"
    ),
    ("config.vllm", "VllmConfig.__post_init__"): "",
    ("platforms.interface", "Platform.get_device_capability"): "device_id",
    ("v1.worker.gpu_worker", "Worker._scoped_allocator_max_split"): "max_split_size_mb",
    ("model_executor.model_loader.default_loader", "DefaultModelLoader.get_all_weights"): "model_config model",
}
"""Module and function of vLLM -> the first arguments that it must have."""

ATTRIBUTES = {
    "model_executor.layers.linear": (
        "num_kv_head_replicas tp_rank tp_size output_size output_partition_sizes prefix params_dtype"
    ),
    "model_executor.layers.vocab_parallel_embedding": (
        "shard_indices org_vocab_size num_embeddings_per_partition org_vocab_start_index num_added_elements"
    ),
    "model_executor.layers.fused_moe.routed_experts": (
        "moe_config ckpt_gate_proj_name ckpt_up_proj_name ckpt_down_proj_name apply_router_weight_on_input expert_map "
        "swiglu_limit swiglu_alpha swiglu_beta"
    ),
    "model_executor.layers.fused_moe.config": (
        "moe_parallel_config use_all2all_kernels has_bias tp_rank tp_size experts_per_token"
    ),
    "model_executor.layers.fused_moe.activation": 'SWIGLUOAI = "swigluoai"',
    "model_executor.models.gpt_oss": 'has_bias=True activation="swigluoai" _load_weights_other _load_weights_mxfp4',
    "model_executor.model_loader.weight_utils": ".experts.routed_experts.",
    "model_executor.layers.logits_processor": "quant_method",
    "config.load": "load_format",
    "config.offload": "uva prefetch cpu_offload_gb offload_group_size",
    "config.parallel": (
        "tensor_parallel_size data_parallel_size prefill_context_parallel_size enable_expert_parallel enable_eplb"
    ),
    "config.vllm": "quant_config lora_config load_config offload_config parallel_config",
    "platforms.interface": "DeviceCapability(NamedTuple): major: minor:",
    "v1.worker.gpu_worker": "max_split_size_mb=20 _accelerator_setAllocatorSettings",
    "model_executor.models.registry": "module_name models",
    "model_executor.models.utils": "get_cache_scale_mapper",
}
"""Module of vLLM -> words that its source has where layers get what the plug-in asks them for."""


def source(module: str) -> str:
    """Return the source of a module below `vllm`."""
    assert PACKAGE is not None and PACKAGE.submodule_search_locations
    path = Path(next(iter(PACKAGE.submodule_search_locations))).joinpath(*module.split("."))
    return (path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py").read_text()


def function(module: str, name: str) -> ast.FunctionDef:
    """Return a method of a class; of overloads the last."""
    owner, own = name.split(".")
    for node in ast.parse(source(module)).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            return [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == own][-1]
    raise AssertionError(f"{module} has no class {owner}")


@needs_vllm
def test_every_name_that_is_imported_is_there() -> None:
    for module, names in vllm_stand_in.names().items():
        tree = ast.parse(source(module.removeprefix("vllm.")))
        known = {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                known |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known.add(node.target.id)
        assert not set(names) - known, module


@needs_vllm
@pytest.mark.parametrize("place", ARGUMENTS, ids=lambda place: place[1])
def test_arguments_are_those_that_the_plug_in_takes(place: tuple[str, str]) -> None:
    found = [argument.arg for argument in function(*place).args.args if argument.arg not in ("self", "cls")]
    wanted = ARGUMENTS[place].split()
    assert found[: len(wanted)] == wanted


@needs_vllm
@pytest.mark.parametrize("module", ATTRIBUTES)
def test_layers_have_what_they_are_asked_for(module: str) -> None:
    text = source(module)
    assert not [word for word in ATTRIBUTES[module].split() if word not in text]


@needs_vllm
def test_a_method_that_vllm_does_not_know_itself_is_entered_and_found_by_config_json() -> None:
    text = source("model_executor.layers.quantization")
    assert "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG" in text and '"tersor"' not in text
    assert "vllm.general_plugins" in source("plugins")
    assert "to_json_string" in source("config.utils")  # what names compiled graphs holds what is added to hf_config


@needs_vllm
@pytest.mark.parametrize("name", ["BloomForCausalLM", "FalconForCausalLM", "Llama4ForCausalLM", "GptOssForCausalLM"])
def test_classes_whose_loaders_are_known_are_called_so(name: str) -> None:
    assert f'"{name}"' in source("model_executor.models.registry")
    text = source("model_executor.models." + {"B": "bloom", "F": "falcon", "L": "llama4", "G": "gpt_oss"}[name[0]])
    assert {"B": "_repack_qkv", "F": "output_dim", "L": "weight_packed", "G": "if name not in params_dict"}[
        name[0]
    ] in text


@needs_vllm
def test_the_options_of_the_page_are_those_of_vllm() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "vllm.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^ {4}(?:\w+=\S+ )*vllm (.*)$", page, re.MULTILINE)
    assert {command.split()[0] for command in commands} == {"serve", "run-batch"}
    served, batch = (source(f"entrypoints.cli.{name}") for name in ("serve", "run_batch"))
    assert 'name = "serve"' in served and 'name = "run-batch"' in batch
    assert "vllm run-batch -i INPUT.jsonl -o OUTPUT.jsonl --model" in batch
    engine = source("engine.arg_utils")
    options = {option for command in commands for option in re.findall(r" (--?[a-z][\w-]*)", command)}
    refused = set(re.findall(r"`(--(?:enable|cpu|offload)[\w-]*)`", page))
    assert options == {"-i", "-o", "--model", "--quantization", "--hf-overrides"} and len(refused) == 4
    assert not [option for option in (options | refused) - {"-i", "-o"} if f'"{option}"' not in engine]


@needs_vllm
def test_the_last_weights_of_a_head_are_asked_for_by_its_method() -> None:
    assert "lm_head.quant_method.apply(" in source("model_executor.layers.logits_processor")
    assert "from_config_dict_json" in source("model_executor.model_loader.weight_utils")


def test_a_vllm_that_does_not_fit_is_left_alone_with_a_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "tersor.integrations.vllm.compat", raising=False)
    register()
    assert "this vLLM does not know its checkpoints, 0.26 and newer do" in caplog.text
