"""Decoders whose experts have one mix a layer: the engine's logits, parts of ranks, and mixes that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoders
from helpers.mixes import compressed, decoded
from helpers.ranks import together
from transformers import AutoModelForCausalLM

from tersor import models
from tersor.convert import quantize
from tersor.errors import InputError
from tersor.formats import Assignment
from tersor.layouts import StackedMixedWeight
from tersor.models.mixture import Mixture
from tersor.ops.collective import Ranks

LONG = {"max_position_embeddings": 256}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "gpt_oss": {"intermediate_size": 96},
    "deepseek_v3": {},
}


def experts_of(decoder: models.Decoder) -> Mixture:
    """Return the experts of the last layer."""
    found = decoder.layers[-1].ffn
    assert isinstance(found, Mixture)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_decoded_weights(kind: str, tmp_path: Path) -> None:
    source, mixed, _ = compressed(kind, tmp_path, **LONG, **KINDS[kind])
    decoder = models.load(mixed, "cpu")
    plain = decoded(source, mixed, tmp_path / "plain")
    reference = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager").eval()
    assert decoders.difference(decoder, reference) < 1e-4
    for weight in (experts_of(decoder).gate_up, experts_of(decoder).down):
        assert isinstance(weight, StackedMixedWeight) and [one.experts for one in weight.sets] == [4, 4, 4]


def test_ranks_have_parts_of_every_level_of_experts(tmp_path: Path) -> None:
    _, mixed, _ = compressed("gpt_oss", tmp_path, **LONG, intermediate_size=96)
    text = decoders.texts(96)[1]
    wanted = decoders.whole(models.load(mixed, "cpu"), text)

    def run(ranks: Ranks) -> tuple[torch.Tensor, tuple[int, ...]]:
        decoder = models.load(mixed, "cpu", ranks=ranks)
        weight = experts_of(decoder).down
        assert isinstance(weight, StackedMixedWeight)
        return decoders.whole(decoder, text), weight.shape

    parts = together(2, run)
    for found, _ in parts:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert sum(shape[2] for _, shape in parts) == 96 and {shape[:2] for _, shape in parts} == {(4, 64)}


def test_experts_of_a_layer_with_several_mixes_are_refused(tmp_path: Path) -> None:
    source, _, assignments = compressed("gpt_oss", tmp_path, intermediate_size=96)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    turned = {**assignments, name: Assignment(assignments[name].mix, assignments[name].level[1:] + b"\0")}
    with pytest.raises(InputError, match=f"{name}: gate and up of a channel of experts have one level"):
        quantize(source, tmp_path / "refused", assignments=turned)
    source, _, assignments = compressed("mixtral", tmp_path / "apart")
    name = next(name for name in assignments if name.endswith("layers.0.mlp.experts.2.w2"))
    other = Assignment(assignments[name].mix, assignments[name].level[::-1])
    with pytest.raises(InputError, match="are experts of one layer, which have one mix"):
        quantize(source, tmp_path / "refused", assignments={**assignments, name: other})
    short = Assignment(other.mix, b"\0")
    with pytest.raises(InputError, match=r"1 output features at levels .* expected 64"):
        quantize(source, tmp_path / "refused", assignments={**assignments, name: short})
