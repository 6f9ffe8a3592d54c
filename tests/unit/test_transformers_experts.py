"""Experts that a checkpoint stores as one tensor a layer: compressed, loaded, saved, family by family."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models as models
from transformers import AutoModelForCausalLM

import tersor
from tersor.integrations.transformers.fused_experts import FusedExperts
from tersor.nn import PackedStack, bits_per_weight

CASES = {
    "gpt_oss": {"format": "fp4_e2m1", "group_size": 4, "overrides": {"down_proj": "int8"}},
    "llama4_text": {"format": "fp6_e3m2"},
    "granitemoe": {"format": "int4", "group_size": 16, "scale_dtype": "bfloat16"},
    "gemma4_text": {"format": "uint5"},
    "aria_text": {"format": "mxfp6_e3m2"},
}


@dataclass(frozen=True)
class Case:
    name: str
    options: dict
    plain: Path
    packed: Path
    folder: Path


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    options = CASES[request.param]
    plain = models.plain(request.param, folder / "plain")
    return Case(request.param, options, plain, models.compressed(plain, folder / "packed", **options), folder)


@pytest.fixture(scope="module")
def loaded(case: Case) -> Any:
    return AutoModelForCausalLM.from_pretrained(case.packed)


def test_logits_are_those_of_the_decoded_weights(case: Case, loaded: Any) -> None:
    reference = AutoModelForCausalLM.from_pretrained(models.decoded(case.plain, case.packed, case.folder / "decoded"))
    original = AutoModelForCausalLM.from_pretrained(case.plain)
    ids = models.token_ids()
    with torch.no_grad():
        got, expected, before = (model(ids).logits for model in (loaded, reference, original))
    assert float((got - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    assert float((got - before).abs().max()) > 1e-3 * float(expected.abs().max())
    assert all(
        isinstance(module.gate_up_proj, PackedStack) for module in loaded.modules() if type(module) is FusedExperts
    )
    assert any(type(module) is FusedExperts for module in loaded.modules())


def test_compressed_while_loading_and_saved_it_is_the_same_checkpoint(case: Case, loaded: Any) -> None:
    while_loading = AutoModelForCausalLM.from_pretrained(
        case.plain, quantization_config=tersor.TersorConfig(**case.options), dtype=torch.float32
    )
    assert models.same(while_loading.state_dict(), loaded.state_dict())
    for model in (while_loading, loaded):
        model.save_pretrained(case.folder / "again")
        assert models.same(models.tensors(case.folder / "again"), models.tensors(case.packed))


def test_dequantize_gives_the_plain_architecture_back(case: Case, loaded: Any) -> None:
    model = copy.deepcopy(loaded)
    ids = models.token_ids()
    with torch.no_grad():
        before = model(ids).logits
        model.dequantize()
        after = model(ids).logits
    assert float((after - before).abs().max()) <= 2e-5 * float(before.abs().max())
    model.save_pretrained(case.folder / "unpacked")
    unpacked, plain = models.tensors(case.folder / "unpacked"), models.tensors(case.plain)
    assert {name: tensor.shape for name, tensor in unpacked.items()} == {n: t.shape for n, t in plain.items()}
