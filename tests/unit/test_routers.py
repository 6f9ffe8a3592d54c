"""Routers that hand their logits on to packed experts: which do, that nothing changes by it, and how it ends."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models as models
from torch import nn
from transformers import AutoModelForCausalLM

from tersor.integrations.transformers import replace
from tersor.integrations.transformers.experts import PackedExperts
from tersor.integrations.transformers.fused_experts import FusedExperts
from tersor.integrations.transformers.router_form import router_form
from tersor.integrations.transformers.routers import Chooser, hands_on

CHOICES = {
    "mixtral": {"normalize": True, "wide": False},
    "qwen2_moe": {"normalize": False},
    "olmoe": {"scoring": "softmax", "groups": 1},
    "deepseek_v2": {"groups": 2, "top_groups": 1, "wide": True, "choice_bias": None},
    "deepseek_v3": {"scoring": "sigmoid", "scale": 2.5, "choice_bias": "e_score_correction_bias"},
}


def packed(name: str, folder: Path, **changes: Any) -> Any:
    plain = models.plain(name, folder / "plain", **changes)
    return AutoModelForCausalLM.from_pretrained(models.compressed(plain, folder / "packed", format="fp6_e3m2")).eval()


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PackedExperts | FusedExperts)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(models.token_ids()).logits


@pytest.mark.parametrize("name", CHOICES)
def test_experts_that_choose_by_logits_give_what_the_router_chose(name: str, tmp_path: Path) -> None:
    model = packed(name, tmp_path)
    choosers = [experts.chooser for experts in layers(model)]
    assert choosers and all(isinstance(chooser, Chooser) for chooser in choosers)
    assert {key: getattr(choosers[0].form, key) for key in CHOICES[name]} == CHOICES[name]
    got = logits(model)
    with_gradient = model(models.token_ids()).logits.detach()
    for chooser in choosers:
        chooser.release()
    expected = logits(model)
    assert torch.allclose(got, expected, atol=2e-5 * float(expected.abs().max()))
    assert torch.equal(with_gradient, expected), "with gradients the router runs as it is"


def test_a_block_that_does_more_with_what_the_router_returns_keeps_it(tmp_path: Path) -> None:
    model = packed("gpt_oss", tmp_path)  # its block returns the weights as well
    assert [experts.chooser for experts in layers(model)] == [None, None]


class Router(nn.Module):
    """Scores, as a test has them, of the best logits in float32."""

    def __init__(self, experts: int, factor: float, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, 16, dtype=dtype))
        self.factor = factor

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.linear(hidden_states, self.weight).float()
        best, index = logits.topk(2, dim=-1)
        return logits, self.factor * best.softmax(dim=-1).type_as(hidden_states), index


def test_logits_that_become_float32_after_the_product_are_known() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        form = router_form(Router(8, 1.0, dtype))
        assert (form.top_k, form.normalize, form.wide, form.widened) == (2, True, False, True)


def test_a_router_of_another_form_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert router_form(Router(8, 1.5)) is None
    monkeypatch.setattr(Router, "forward", lambda self, hidden_states, mask: None)
    assert router_form(Router(9, 1.0)) is None


class Block(nn.Module):
    def good(self, x: torch.Tensor) -> torch.Tensor:
        _logits, weights, index = self.gate(x)
        return self.experts(x, index, weights)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(x)
        weights = weights * 2
        return self.experts(x, index, weights)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.gate(x)
        return self.experts(x, weights, index)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, *self.gate(x)[1:])


@pytest.mark.parametrize(("name", "expected"), [("good", True), ("scaled", False), ("turned", False), ("whole", False)])
def test_a_block_is_read_for_what_it_does_with_the_choice(name: str, expected: bool) -> None:
    block = type("One", (nn.Module,), {"forward": getattr(Block, name)})
    assert hands_on(block, "gate", "experts") is expected
    assert not hands_on(block, "router", "experts")


def test_what_a_model_says_of_its_router_stays(tmp_path: Path) -> None:
    model = packed("qwen3_moe", tmp_path)
    with torch.no_grad():
        found = model(models.token_ids(), output_router_logits=True)
    for experts in layers(model):
        experts.chooser.release()
    with torch.no_grad():
        expected = model(models.token_ids(), output_router_logits=True)
    assert len(found.router_logits) == 2
    assert torch.allclose(found.router_logits[0], expected.router_logits[0], atol=1e-5)
    assert torch.allclose(found.aux_loss, expected.aux_loss, atol=1e-5)


def test_a_model_in_16_bits_chooses_as_before(tmp_path: Path) -> None:
    model = packed("deepseek_v3", tmp_path, dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16 and layers(model)[0].chooser.form.wide
    got = logits(model).float()
    for experts in layers(model):
        experts.chooser.release()
    expected = logits(model).float()
    assert float((got - expected).abs().max()) <= 0.05 * float(expected.abs().max())


def test_copies_choose_for_themselves_and_decoded_models_as_transformers(tmp_path: Path) -> None:
    model = packed("mixtral", tmp_path)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        chooser = layers(other)[0].chooser
        assert chooser.experts is layers(other)[0] and chooser.router is not layers(model)[0].chooser.router
        assert torch.equal(logits(other), expected)
    replace.unpack_model(model, torch.float32)
    assert not layers(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.allclose(logits(model), expected, atol=2e-5 * float(expected.abs().max()))


def test_other_experts_in_the_same_place_get_the_routers_own_choice(tmp_path: Path) -> None:
    model = packed("mixtral", tmp_path)
    expected = logits(model)
    layer = model.model.layers[0].mlp
    layer.experts = copy.deepcopy(layer.experts).plain(torch.float32)
    assert torch.allclose(logits(model), expected, atol=2e-5 * float(expected.abs().max()))


def test_torch_compile_takes_a_block_whose_experts_choose_by_logits(tmp_path: Path) -> None:
    block = packed("qwen3_moe", tmp_path).model.layers[0].mlp
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = block(x)
        assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected)
