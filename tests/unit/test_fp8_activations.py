"""Activations quantised to e4m3: what it means, alone and in layers that are joined."""

from __future__ import annotations

import pytest
import torch

from tersor import nn, ops
from tersor.compress import quantize_rtn
from tersor.formats import Activations, get_scheme
from tersor.integrations.transformers import fuse, replace
from tersor.layouts import PackedWeight
from tersor.ops import dispatch


def packed(name: str, oc: int = 24, ic: int = 96, group_size: int | None = None) -> PackedWeight:
    scheme = get_scheme(name, group_size)
    return PackedWeight.from_encoded(quantize_rtn(torch.randn(oc, ic), scheme))


def test_a_token_is_scaled_to_the_largest_code() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64) * torch.tensor([[1e-6], [1.0], [300.0], [0.0], [1e30]])
    codes, scale = Activations.E4M3.quantize(x)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.float().abs().amax(dim=1).tolist() == [448.0, 448.0, 448.0, 0.0, 448.0]
    decoded = codes.float() * scale
    assert ((decoded - x).abs() <= x.abs() / 16 + scale * 2.0**-10).all()
    assert scale[3] == 0.0


@pytest.mark.parametrize(("name", "group_size"), [("fp6_e3m2", None), ("fp6_e2m3", 32), ("fp4_e2m1", 96)])
def test_the_layout_says_that_activations_are_quantised(name: str, group_size: int | None) -> None:
    torch.manual_seed(1)
    weight = packed(name, group_size=group_size)
    x, bias = torch.randn(7, 96), torch.randn(24)
    codes, scale = Activations.E4M3.quantize(x)
    expected = (codes.double() * scale.double()) @ weight.dequantize(torch.float64).T + bias.double()
    y = ops.linear(x, weight.to_layout(dispatch.E4M3_LAYOUT), bias)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, ops.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_joined_layers_quantise_their_activations_as_well() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    scheme = get_scheme("fp6_e3m2")
    for name, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            encoded = quantize_rtn(module.weight.detach(), scheme)
            model.model.set_submodule(
                name, nn.PackedLinear.from_packed(PackedWeight.from_encoded(encoded), dtype=torch.float32)
            )
    ids = torch.arange(10)[None]
    with torch.no_grad():
        plain = model(ids).logits
        replace.multiply_with(model, "fp8")
        expected = model(ids).logits
        assert fuse.fuse(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        replace.multiply_with(model, "16bit")
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, plain, rtol=1e-4, atol=1e-5)
