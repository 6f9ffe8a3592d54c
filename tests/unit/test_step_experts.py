"""The experts of a decode step: which can be captured, which run in another way, and what is said where none can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints
from helpers import packed_models as models
from transformers import AutoModelForCausalLM

from tersor.integrations.transformers import step_experts
from tersor.integrations.transformers.step_experts import StepExperts


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.plain("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe") / "plain")


def test_a_plain_mixture_without_a_grouped_kernel_runs_batched_in_steps(plain: Path, monkeypatch: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain).eval()
    ids = models.token_ids()
    own = model.config._experts_implementation
    assert own == "grouped_mm"
    with torch.no_grad():
        expected = model(ids).logits
    experts = StepExperts(model, graph=True)
    assert experts.obstacle == ""
    with experts.step(), torch.no_grad():
        assert model.config._experts_implementation == "batched_mm"
        got = model(ids).logits
    assert model.config._experts_implementation == own
    assert torch.allclose(got, expected, atol=1e-5)
    with StepExperts(model, graph=False).step():
        assert model.config._experts_implementation == own
    monkeypatch.setattr(step_experts, "has_grouped_kernel", lambda weight: True)
    with StepExperts(model, graph=True).step():
        assert model.config._experts_implementation == own


def test_a_way_that_waits_is_the_users_choice_and_is_said(plain: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain, experts_implementation="eager").eval()
    experts = StepExperts(model, graph=True)
    with experts.step():
        assert model.config._experts_implementation == "eager"
    assert experts.obstacle == (
        "model.layers.0.mlp.experts runs one expert after the other: load the model with "
        "experts_implementation='grouped_mm'"
    )


def test_packed_experts_without_a_kernel_say_why(plain: Path, tmp_path: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(models.compressed(plain, tmp_path / "packed", format="fp6_e3m2"))
    obstacle = StepExperts(packed, graph=True).obstacle
    assert obstacle.startswith("model.layers.0.mlp.experts runs one expert after the other: kernels need a CUDA device")
    parts = models.compressed(plain, tmp_path / "apart", format="fp6_e3m2", overrides={"experts.1.gate_proj": "int8"})
    apart = AutoModelForCausalLM.from_pretrained(parts)
    assert "are not packed in one scheme" in StepExperts(apart, graph=True).obstacle


def test_models_without_experts_have_no_obstacle(tmp_path: Path) -> None:
    checkpoints.save("llama", tmp_path, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert StepExperts(model, graph=True).obstacle == ""
