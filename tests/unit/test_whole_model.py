"""Packed models among transformers' own methods, and packed layers among torch's: as plain ones, or one clear line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

import tersor
from tersor.compress import quantize_rtn
from tersor.errors import UnsupportedError
from tersor.formats import get_scheme
from tersor.layouts import PackedWeight
from tersor.nn import PackedEmbedding, PackedLinear

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"
IDS = torch.arange(8)[None]


def load(embedding: bool = False) -> Any:
    config = tersor.TersorConfig(overrides={"embed_tokens": "fp6_e3m2"} if embedding else {})
    return AutoModelForCausalLM.from_pretrained(TINY, quantization_config=config, dtype=torch.float32)


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


@pytest.mark.parametrize("embedding", [False, True])
def test_parameters_are_counted_as_in_the_plain_model(embedding: bool, plain: Any) -> None:
    model = load(embedding)
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable < plain.num_parameters()
    assert copy.deepcopy(model).num_parameters() == plain.num_parameters()
    assert model.get_memory_footprint() < 0.6 * plain.get_memory_footprint()


def test_fewer_layers_than_are_stored_load_as_in_the_plain_model(tmp_path: Path) -> None:
    model = load()
    model.save_pretrained(tmp_path)
    short = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2, dtype=torch.float32)
    del model.model.layers[2:]
    assert torch.equal(short(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("by", [8, -8])
def test_a_packed_embedding_is_decoded_to_be_resized(by: int, tmp_path: Path) -> None:
    model = load(embedding=True)
    before, size = model(IDS).logits, model.config.vocab_size
    assert isinstance(model.resize_token_embeddings(size), PackedEmbedding)
    assert isinstance(model.resize_token_embeddings(pad_to_multiple_of=64), PackedEmbedding)
    resized = model.resize_token_embeddings(size + by)
    assert type(resized) is torch.nn.Embedding and model.lm_head.weight is resized.weight
    after = model(IDS).logits
    least = min(size, size + by)
    assert after.shape[-1] == model.config.vocab_size == size + by
    assert torch.allclose(after[..., :least], before[..., :least], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(IDS).logits, after)


def test_a_model_on_the_meta_device_gives_meta_results() -> None:
    model = load(embedding=True).to("meta")
    assert model(IDS.to("meta")).logits.shape == (1, 8, model.config.vocab_size)
    layer = model.model.layers[0].mlp.down_proj
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(0, 3, layer.in_features, device="meta")).shape == (0, 3, layer.out_features)


def layer() -> PackedLinear:
    weight = PackedWeight.from_encoded(quantize_rtn(torch.randn(24, 64), get_scheme("fp6_e3m2")))
    return PackedLinear.from_packed(weight, torch.randn(24))


def test_inputs_of_any_rank_stride_and_float_dtype_are_taken() -> None:
    packed = layer()
    dense = packed.packed_weight().dequantize(torch.float64)
    wide = torch.randn(64, 5, 7, dtype=torch.float64)
    for x in (wide.T, wide[:, 0].T, wide[:, 0, 0], wide.permute(2, 1, 0)[::2], wide[:, :0].T):
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1)):
            found = packed(x.to(dtype))
            assert found.dtype == dtype and packed.bias is not None
            expected = torch.nn.functional.linear(x, dense, packed.bias.double())
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_packed_weight_is_neither_set_nor_initialised() -> None:
    packed = layer()
    with pytest.raises(UnsupportedError, match="the weight of a PackedLinear is packed and cannot be set"):
        packed.weight = torch.nn.Parameter(torch.ones(24, 64))
    with pytest.raises(UnsupportedError, match="packed weights are not initialised"):
        packed.reset_parameters()
