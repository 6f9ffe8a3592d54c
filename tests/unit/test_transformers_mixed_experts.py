"""Experts of a mix through transformers: one operator a layer, stored again and decoded as they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models
from helpers.mixes import compressed, decoded
from transformers import AutoModelForCausalLM

from tersor.integrations.transformers.expert_parts import ExpertMixed
from tersor.integrations.transformers.experts import PackedExperts
from tersor.integrations.transformers.fused_experts import FusedExperts
from tersor.nn import MixedStack, bits_per_weight

KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "gpt_oss": {"intermediate_size": 96},
    "granitemoe": {"intermediate_size": 96},
    "llama4_text": {"intermediate_size": 96, "intermediate_size_mlp": 128},
}
Saved = tuple[Path, Path, Path]


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A small model, its mix, and what the mix decodes to."""
    folder = tmp_path_factory.mktemp(request.param)
    source, mixed, _ = compressed(request.param, folder, **KINDS[request.param])
    return source, mixed, decoded(source, mixed, folder / "decoded")


@pytest.fixture(scope="module")
def loaded(saved: Saved) -> Any:
    """The mix as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(saved[1], dtype=torch.float32)


@pytest.fixture(scope="module")
def plain(saved: Saved) -> Any:
    """The model of the decoded weights."""
    return AutoModelForCausalLM.from_pretrained(saved[2], dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    """Return what a model says of some tokens."""
    with torch.no_grad():
        return model(packed_models.token_ids(2, 7)).logits


def test_all_experts_run_as_one_operator_and_give_what_decoded_ones_give(loaded: Any, plain: Any) -> None:
    experts = [module for module in loaded.modules() if isinstance(module, PackedExperts | FusedExperts)]
    assert experts and all(module.joins for module in experts)
    stacks = [module for module in loaded.modules() if isinstance(module, MixedStack)]
    assert len(stacks) == 2 * len(experts) and all(len(stack.row_sets) == 3 for stack in stacks)
    torch.testing.assert_close(logits(loaded), logits(plain), rtol=1e-4, atol=1e-4)
    found = bits_per_weight(loaded)
    assert found is not None and 4.5 < found < 6.5 and loaded.num_parameters() == plain.num_parameters()


def test_saved_again_it_is_the_same_checkpoint(saved: Saved, loaded: Any, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path)
    assert packed_models.same(packed_models.tensors(tmp_path), packed_models.tensors(saved[1]))
    assert packed_models.config(tmp_path) == packed_models.config(saved[1])


def test_decoded_it_is_the_plain_architecture(loaded: Any, plain: Any) -> None:
    model = copy.deepcopy(loaded)
    model.dequantize()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_it_is_cast_and_loaded_anew(loaded: Any) -> None:
    before = logits(loaded)
    model = copy.deepcopy(loaded).to(torch.float64).to(torch.float32)
    torch.testing.assert_close(logits(model), before)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    key = next(key for key in state if ("experts" in key and "down" in key) or ("w2" in key and "packed" in key))
    changed = {**state, key: state[key].flip(0)}
    model.load_state_dict(changed)
    assert torch.equal(model.state_dict()[key], changed[key])
    model.load_state_dict(state)
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("saved", ["mixtral"], indirect=True)
def test_experts_that_are_kept_apart_are_mixed_layers_of_their_own(loaded: Any) -> None:
    model = copy.deepcopy(loaded)
    layer = next(module for module in model.modules() if isinstance(module, ExpertMixed))
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-4, atol=1e-4)
    for module in model.modules():
        if isinstance(module, PackedExperts):
            module.keep_apart()
    assert not any(isinstance(module, MixedStack) for module in model.modules())
    torch.testing.assert_close(logits(model), logits(loaded), rtol=1e-4, atol=1e-4)
