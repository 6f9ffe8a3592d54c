"""A model on a GPU is packed in place: the bytes are those of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import packed_models as models
from transformers import AutoModelForCausalLM

import tersor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("options", [{"format": "fp6_e3m2"}, {"format": "int4", "group_size": 32}], ids=str)
def test_a_model_on_the_gpu_saves_what_the_path_form_writes(tmp_path: Path, options: dict) -> None:
    plain = models.plain("llama", tmp_path / "plain", torch.bfloat16, hidden_size=512, intermediate_size=1408)
    tersor.quantize(plain, tmp_path / "packed", **options)
    model = AutoModelForCausalLM.from_pretrained(plain).cuda()
    tersor.quantize(model, **options)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    with torch.no_grad():
        assert bool(torch.isfinite(model(models.token_ids().cuda()).logits).all())
    model.save_pretrained(tmp_path / "saved")
    assert models.same(models.tensors(tmp_path / "saved"), models.tensors(tmp_path / "packed"))
