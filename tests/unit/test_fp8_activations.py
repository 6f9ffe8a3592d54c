"""Activations quantised to e4m3: what it means, who says no, and how a model is switched."""

from __future__ import annotations

import math

import pytest
import torch

from tersor import nn, ops
from tersor.compress import quantize_rtn
from tersor.errors import InputError, UnsupportedError
from tersor.formats import Activations, get_scheme
from tersor.hardware import CHIPS
from tersor.integrations.transformers import fuse, replace
from tersor.kernels import dense as family
from tersor.kernels import tune
from tersor.kernels.tune import sm90
from tersor.layouts import STREAM, PackedWeight
from tersor.layouts.packing import Packing
from tersor.ops import dispatch

H200 = CHIPS["NVIDIA H200"]


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


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so_in_its_token_only(bad: float) -> None:
    x = torch.ones(2, 96)
    x[0, 7] = bad
    y = ops.linear(x, packed("fp6_e3m2").to_layout(dispatch.E4M3_LAYOUT))
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


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


def test_linears_of_a_model_are_switched_and_back() -> None:
    weight = packed("fp6_e3m2")
    model = torch.nn.Sequential(nn.PackedLinear.from_packed(weight), torch.nn.ReLU())
    x = torch.randn(3, 96)
    before, state = model(x), model.state_dict()
    replace.multiply_with(model, "fp8")
    quantised = model(x)
    assert not torch.equal(before, quantised)
    torch.testing.assert_close(before, quantised, rtol=0.1, atol=1.5)  # of sums of about 10
    assert model[0].layout == dispatch.E4M3_LAYOUT
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    replace.multiply_with(model, "16bit")
    assert torch.equal(model(x), before)
    assert model[0].layout == STREAM


def test_what_cannot_be_multiplied_is_named_and_nothing_changes() -> None:
    model = torch.nn.Sequential(
        nn.PackedLinear.from_packed(packed("fp6_e3m2")), nn.PackedLinear.from_packed(packed("int8"))
    )
    with pytest.raises(UnsupportedError, match=r"^1: activations fp8 with weights in int8"):
        replace.multiply_with(model, "fp8")
    assert model[0].activations == "16bit"
    with pytest.raises(InputError, match=r"activations 'fp9', did you mean 'fp8'\?"):
        replace.multiply_with(model, "fp9")
    with pytest.raises(UnsupportedError, match="group size 16 is not a multiple of 32"):
        ops.preferred_layout(get_scheme("fp6_e3m2", 16), torch.float16, torch.device("cpu"), "fp8")


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


def test_choices_and_sources() -> None:
    packing = Packing.of(get_scheme("fp6_e3m2"), "float8_e4m3fn")
    names = {source.name for source in family.quantized_sources(packing, "float16", H200)}
    for n in (1, 16, 17, 64, 65, 300, 5000):
        problem = tune.LinearProblem(oc=4096, ic=4096, n=n, bits=6, activations=Activations.E4M3)
        config = tune.choose(problem, H200)
        assert config.schedule == tune.SM90
        assert config.activations is Activations.E4M3
        assert sm90.box_rows(config, n) <= n
        assert family.fused_source(packing, "float16", config).name in names
    assert not list(family.quantized_sources(packing, "float16", CHIPS["NVIDIA A100"]))
