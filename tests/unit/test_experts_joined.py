"""Experts that a checkpoint stores one by one: one operator where they can, one after the other where they cannot."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models as models
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tersor
from tersor.integrations.transformers import replace
from tersor.integrations.transformers.expert_parts import ExpertPart
from tersor.integrations.transformers.experts import PackedExperts
from tersor.nn import PackedLinear


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    return models.compressed(models.plain("qwen3_moe", folder / "plain"), folder / "packed", format="fp6_e3m2")


@pytest.fixture
def model(packed: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(packed)


def experts_of(model: Any) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(models.token_ids()).logits


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_joined_experts_give_what_they_give_apart_and_are_moved_and_loaded_as_they_are_stored(
    model: Any, packed: Path
) -> None:
    assert len(experts_of(model)) == 2 and all(experts.gate_up is not None for experts in experts_of(model))
    together, stored = logits(model), models.tensors(packed)
    for module in (model.to(torch.float64).to(torch.float32), copy.deepcopy(model)):
        assert close(logits(module), together)
        assert models.same({key: tensor for key, tensor in module.state_dict().items() if key in stored}, stored)
    other = {key: tensor.flip(0) if "experts.1.down_proj" in key else tensor for key, tensor in stored.items()}
    model.load_state_dict(other)
    assert not close(logits(model), together)
    assert torch.equal(
        model.state_dict()["model.layers.0.mlp.experts.1.down_proj.weight_packed"],
        other["model.layers.0.mlp.experts.1.down_proj.weight_packed"],
    )
    model.load_state_dict(stored)
    part = model.model.layers[0].mlp.experts._layers(3)["up_proj"]
    x = torch.randn(2, 64)
    torch.testing.assert_close(part(x), x @ part.weight.T)
    for experts in experts_of(model):
        experts.keep_apart()
        assert experts.gate_up is None
    assert close(logits(model), together)


def test_8_bit_activations_reach_the_experts(model: Any) -> None:
    before = logits(model)
    replace.multiply_with(model, "fp8")
    eight = logits(model)
    assert not close(eight, before) and close(eight, before, 0.2)
    replace.multiply_with(model, "16bit")
    assert close(logits(model), before)


def test_adapters_over_experts_are_trained_while_the_experts_stay_apart(model: Any) -> None:
    before = logits(model)
    # In a whole model of this type, peft would look for the fused parameters of uncompressed experts.
    inject_adapter_in_model(LoraConfig(r=2, target_modules=r"experts\.\d\.(up|down)_proj"), model.model.layers[0].mlp)
    assert [experts.gate_up is None for experts in experts_of(model)] == [True, False]
    assert close(logits(model), before)
    model(input_ids=models.token_ids(), labels=models.token_ids()).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
    assert len(gradients) == 8 and any(bool(gradient.any()) for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {}])
def test_experts_whose_gate_has_no_kernel_or_that_differ_run_one_after_the_other(
    changes: dict[str, str], tmp_path: Path
) -> None:
    plain = models.plain("mixtral", tmp_path / "plain", **changes)
    overrides = {} if changes else {r"experts\.2\.w3": "int8"}
    packed = models.compressed(plain, tmp_path / "packed", format="fp6_e3m2", overrides=overrides)
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert not any(isinstance(module, ExpertPart) for module in model.modules())
    assert not model.hf_quantizer.is_compileable  # which tokens go where, the host has to know
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 32
    reference = AutoModelForCausalLM.from_pretrained(models.decoded(plain, packed, tmp_path / "decoded"))
    assert close(logits(model), logits(reference))


def test_released_fused_experts_of_a_model_with_merged_names_stay_fused(packed: Path, tmp_path: Path) -> None:
    plain = packed.parent / "plain"
    tensors = models.tensors(plain)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        each = [[tensors.pop(f"{prefix}.{i}.{name}_proj.weight") for name in ("gate", "up", "down")] for i in range(4)]
        tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(own[:2]) for own in each])
        tensors[f"{prefix}.down_proj"] = torch.stack([own[2] for own in each])
    fused = models.plain("qwen3_moe", tmp_path / "fused")
    save_file(tensors, fused / "model.safetensors", {"format": "pt"})
    compressed = models.compressed(fused, tmp_path / "packed", format="fp6_e3m2")
    model, one_by_one = (AutoModelForCausalLM.from_pretrained(folder) for folder in (compressed, packed))
    assert torch.equal(logits(model), logits(one_by_one))
    live = AutoModelForCausalLM.from_pretrained(fused)
    tersor.quantize(live, format="fp6_e3m2")
    for each_model in (model, live):
        each_model.save_pretrained(tmp_path / "again")
        assert models.same(models.tensors(tmp_path / "again"), models.tensors(compressed))
