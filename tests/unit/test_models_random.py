"""Decoders of known sizes without their weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import decoders

from tersor import models
from tersor.errors import InputError
from tersor.formats import Outliers, get_scheme
from tersor.layouts import PackedWeight, StackedWeight
from tersor.models.config import DecoderConfig
from tersor.models.expected import Expected
from tersor.models.geometries import GEOMETRIES, geometry
from tersor.models.mixture import Mixture
from tersor.models.names import NAMES
from tersor.models.weights import GatedProduct, Product

BILLIONS = {
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.02,
    "llama-2-70b": 68.98,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "mistral-7b": 7.25,
    "qwen2.5-7b": 7.62,
    "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76,
    "qwen2.5-72b": 72.71,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.76,
    "opt-6.7b": 6.66,
    "opt-13b": 12.85,
    "opt-30b": 29.97,
    "opt-66b": 65.72,
    "qwen3-30b-a3b": 30.53,
    "mixtral-8x7b": 46.70,
    "deepseek-v3": 671.03,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
}
"""Parameters, as the makers of the models count them."""


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_geometry_has_the_parameters_of_its_model(name: str) -> None:
    config = geometry(name)
    expected = Expected.of(config, NAMES[config.architecture])
    count = sum(math.prod(shape) for shape in (*expected.matrices.values(), *expected.vectors.values()))
    assert count / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="no geometry 'llama-3-8', did you mean 'llama-3-8b'"):
        models.random_decoder("llama-3-8", None, "cpu")


def tiny(name: str, **changes: object) -> DecoderConfig:
    """Return the kind of decoder that a geometry has, in a size for any machine."""
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    small |= {"intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 96, "max_position_embeddings": 256}
    return DecoderConfig.from_dict({**GEOMETRIES[name], **small, **changes})


def test_layers_of_one_kind_hold_the_same_numbers_in_memory_of_their_own() -> None:
    scheme = get_scheme("fp6_e3m2")
    decoder = models.random_decoder(tiny("llama-3-8b"), scheme, "cpu", torch.float32, head=get_scheme("int8"))
    assert len(decoder.layers) == len(decoder.config.layers) == 3
    first, last = decoder.layers[0], decoder.layers[2]
    assert isinstance(first.attention.out.weight, PackedWeight) and isinstance(last.attention.out.weight, PackedWeight)
    assert torch.equal(first.attention.out.weight.data, last.attention.out.weight.data)
    assert first.attention.out.weight.data.data_ptr() != last.attention.out.weight.data.data_ptr()
    assert first.attention.rotary is last.attention.rotary
    assert isinstance(decoder.head.weight, PackedWeight) and decoder.head.weight.scheme.name == "int8"
    assert isinstance(decoder.embedding.weight, torch.Tensor)
    linears = 64 * 128 + 64 * 64 + 3 * 64 * 96
    packed = 3 * linears * 6 // 8 + 96 * 64
    assert packed < decoder.nbytes < 1.1 * packed + 4 * 96 * 64 + 4 * 7 * 64


@pytest.mark.parametrize("name", ["llama-3-8b", "opt-30b", "qwen3-30b-a3b", "gpt-oss-20b", "qwen3-8b"])
@pytest.mark.parametrize("scheme", [None, "fp6_e3m2"])
def test_a_random_decoder_runs(name: str, scheme: str | None) -> None:
    changes: dict[str, object] = {"moe_intermediate_size": 32, "num_experts": 8, "ffn_dim": 96, "sliding_window": 20}
    if name != "qwen3-30b-a3b":
        changes.pop("num_experts")
    config = tiny(name, **changes)
    decoder = models.random_decoder(config, scheme and get_scheme(scheme), "cpu", torch.float32)
    found = torch.cat(decoders.logits(decoder, decoders.texts(96)))
    assert bool(found.isfinite().all()) and float(found.std()) > 0.01
    if isinstance(decoder.layers[0].ffn, Mixture):
        kind = StackedWeight if scheme else torch.Tensor
        assert isinstance(decoder.layers[0].ffn.gate_up, kind)
        assert isinstance(decoder.layers[0].ffn.router.weight, torch.Tensor)


def test_a_seed_makes_the_same_weights_again() -> None:
    config = replace(tiny("llama-3-8b"), layers=tiny("llama-3-8b").layers[:1])
    made = [models.random_decoder(config, get_scheme("int4", 32), "cpu", seed=seed) for seed in (1, 1, 2)]
    up = [one.layers[0].ffn.up for one in made if not isinstance(one.layers[0].ffn, Mixture)]
    weights = [one.weight.data for one in up if isinstance(one, GatedProduct)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert isinstance(made[0].head, Product) and made[0].head.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b"])
def test_outliers_stand_beside_random_codes_but_not_in_experts(name: str) -> None:
    kept = Outliers.parse("2%", "bfloat16")
    scheme = replace(get_scheme("int4", 32), outliers=kept)
    decoder = models.random_decoder(tiny(name), scheme, "cpu", torch.float32)
    for layer in decoder.layers:
        weight = layer.attention.out.weight
        assert isinstance(weight, PackedWeight) and weight.scheme == scheme and weight.outliers is not None
        assert weight.outliers.shape == (64, kept.per_row(64))
        beside = weight.dequantize() - weight.dense.dequantize()
        assert (beside != 0).sum(1).min() > 0
        if isinstance(layer.ffn, Mixture):
            experts = layer.ffn.gate_up
            assert isinstance(experts, StackedWeight) and experts.scheme == scheme.dense
