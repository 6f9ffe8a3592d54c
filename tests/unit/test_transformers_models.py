"""Compressed checkpoints in transformers, architecture by architecture: loaded, compressed while loading, saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import packed_models as models
from transformers import AutoModelForCausalLM

import tersor
from tersor.integrations.transformers.experts import PackedExperts
from tersor.nn import PackedLinear

# Architecture -> options: between them every kind of format, scale, bias, tying, and of expert.
CASES = {
    "llama": {"format": "fp6_e3m2"},
    "qwen2": {"format": "fp6_e2m3", "tie_word_embeddings": True},
    "opt": {"format": "uint4", "group_size": 32},
    "gpt2": {"format": "fp5_e2m2", "group_size": 32, "scale_dtype": "bfloat16"},
    "falcon": {"format": "int8"},
    "mixtral": {"format": "int4", "group_size": 32, "scale_dtype": "float32"},
    "qwen2_moe": {"format": "fp6_e3m2"},
    "qwen3_moe": {"format": "mxfp6_e3m2"},
    "olmoe": {"format": "uint4", "group_size": 32},
    "deepseek_v2": {"format": "fp4_e2m1", "group_size": 16},
    "deepseek_v3": {"format": "fp6_e3m2"},
}
EXPERTS = {"mixtral": 2, "qwen2_moe": 2, "qwen3_moe": 2, "olmoe": 2, "deepseek_v2": 1, "deepseek_v3": 1}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> models.Case:
    options = dict(CASES[request.param])
    changes = {"tie_word_embeddings": True} if options.pop("tie_word_embeddings", False) else {}
    return models.case(request.param, tmp_path_factory.mktemp(request.param), options, **changes)


@pytest.fixture(scope="module")
def loaded(case: models.Case) -> Any:
    return AutoModelForCausalLM.from_pretrained(case.packed)


def test_the_model_holds_only_packed_weights(case: models.Case, loaded: Any) -> None:
    stems = {key.removesuffix(models.SUFFIX) for key in models.tensors(case.packed) if key.endswith(models.SUFFIX)}
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, PackedLinear)}
    assert len(layers) == len(stems) > 0
    plain = [name for name, module in loaded.named_modules() if isinstance(module, torch.nn.Linear)]
    assert all(name.split(".")[-1] in ("lm_head", "gate", "shared_expert_gate") for name in plain)
    held = sum(tensor.nbytes for tensor in {**loaded.state_dict()}.values())
    tied = loaded.lm_head.weight.nbytes if loaded.config.tie_word_embeddings else 0
    on_disk = sum(tensor.nbytes for tensor in models.tensors(case.packed).values())
    assert held - tied == on_disk
    experts = [module for module in loaded.modules() if isinstance(module, PackedExperts)]
    assert len(experts) == EXPERTS.get(case.name, 0) and all(module.gate_up is not None for module in experts)
    assert not any(tensor.device.type == "meta" for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_logits_are_those_of_the_decoded_weights(case: models.Case, loaded: Any) -> None:
    models.check_logits(case, loaded)


def test_compressing_while_loading_gives_the_same_model(case: models.Case, loaded: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        case.plain, quantization_config=tersor.TersorConfig(**case.options), dtype=torch.float32
    )
    assert models.same(model.state_dict(), loaded.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in loaded.modules()]
    assert model.config.quantization_config.to_dict() == {
        **models.config(case.packed),
        "provenance": {**models.config(case.packed)["provenance"], "source": "plain"},
    }
    model.save_pretrained(case.folder / "while_loading")
    assert models.same(models.tensors(case.folder / "while_loading"), models.tensors(case.packed))


def test_save_pretrained_writes_the_same_checkpoint(case: models.Case, loaded: Any) -> None:
    loaded.save_pretrained(case.folder / "again")
    assert models.same(models.tensors(case.folder / "again"), models.tensors(case.packed))
    assert models.config(case.folder / "again") == models.config(case.packed)


def test_dequantize_gives_the_plain_architecture_back(case: models.Case, loaded: Any) -> None:
    model = models.check_dequantize(case, loaded)
    assert not any(isinstance(module, PackedLinear | PackedExperts) for module in model.modules())
    assert any(isinstance(module, PackedLinear) for module in loaded.modules())


def test_generates(case: models.Case, loaded: Any) -> None:
    ids = models.token_ids(1, 5)
    tokens = loaded.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 9)
    with torch.no_grad():
        assert int(loaded(tokens[:, :-1]).logits[0, 4].argmax()) == int(tokens[0, 5])
