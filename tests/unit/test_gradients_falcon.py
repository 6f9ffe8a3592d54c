"""Falcon's blocks add to what a linear returned in place: packed ones have the gradients of what they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import packed_models, pruned
from transformers import AutoModelForCausalLM

from tersor.convert import quantize


def gradients(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the embeddings and of the last norm of a text's loss."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = packed_models.token_ids()
    model(ids, labels=ids).loss.backward()
    return model.transformer.word_embeddings.weight.grad, model.transformer.ln_f.weight.grad


@pytest.mark.parametrize("options", [{"format": "fp6_e3m2"}, {"format": "lut3"}, {}], ids=["dense", "tables", "sparse"])
def test_gradients_of_a_packed_falcon_are_those_of_its_decoded_weights(options: dict[str, str], tmp_path: Path) -> None:
    if options:
        plain = packed_models.plain("falcon", tmp_path / "plain")
        packed = packed_models.compressed(plain, tmp_path / "packed", **options)
        plain = packed_models.decoded(plain, packed, tmp_path / "decoded")
    else:
        plain = pruned.saved("falcon", tmp_path / "plain", 0.4, torch.float32)
        quantize(plain, tmp_path / "packed", format="fp32")
        packed = tmp_path / "packed"
    for found, wanted in zip(gradients(packed), gradients(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
