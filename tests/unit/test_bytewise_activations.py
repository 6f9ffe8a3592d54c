"""Activations quantised to 8 bits, whatever their codes are: a model is switched and back, and who says no says why."""

from __future__ import annotations

import math

import pytest
import torch

from tersor import nn, ops
from tersor.compress import quantize_rtn
from tersor.errors import InputError, UnsupportedError
from tersor.formats import Activations, get_scheme
from tersor.hardware import CHIPS
from tersor.integrations.transformers import replace
from tersor.kernels import dense as family
from tersor.kernels import tune
from tersor.kernels.tune import sm90
from tersor.layouts import STREAM, PackedWeight
from tersor.layouts.packing import Packing
from tersor.ops import dispatch

KINDS = [("fp8", "fp6_e3m2", None), ("int8", "uint4", 32), ("int8:g128", "int4", 128)]
"""(Activations, a format that they meet, channels that share a scale)."""
H200 = CHIPS["NVIDIA H200"]


def packed(name: str, group_size: int | None = None, oc: int = 24, ic: int = 384) -> PackedWeight:
    weight = torch.randn(oc, ic, generator=torch.Generator().manual_seed(oc + ic))
    return PackedWeight.from_encoded(quantize_rtn(weight, get_scheme(name, group_size)))


def layout_of(kind: str, weight: PackedWeight) -> str:
    return ops.preferred_layout(weight.scheme, torch.float32, torch.device("cpu"), kind)


@pytest.mark.parametrize(("kind", "name", "group_size"), KINDS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so_in_its_token_only(
    kind: str, name: str, group_size: int | None, bad: float
) -> None:
    weight = packed(name, group_size)
    x = torch.ones(2, 384)
    x[0, 7] = bad
    y = ops.linear(x, weight.to_layout(layout_of(kind, weight)))
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize(("kind", "name", "group_size"), KINDS)
def test_linears_of_a_model_are_switched_and_back(kind: str, name: str, group_size: int | None) -> None:
    weight = packed(name, group_size)
    model = torch.nn.Sequential(nn.PackedLinear.from_packed(weight), torch.nn.ReLU())
    x = torch.randn(3, 384, generator=torch.Generator().manual_seed(2))
    before, state = model(x), model.state_dict()
    replace.multiply_with(model, kind)
    quantised = model(x)
    assert not torch.equal(before, quantised)
    # Of sums of about 20; e4m3 has a sixteenth of every number, int8 a 254th of the largest.
    torch.testing.assert_close(before, quantised, rtol=0.1, atol=2.0 if kind == "fp8" else 0.6)
    assert model[0].layout == layout_of(kind, weight) != STREAM
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    replace.multiply_with(model, "16bit")
    assert torch.equal(model(x), before)
    assert model[0].layout == STREAM


@pytest.mark.parametrize(
    ("kind", "good", "bad", "near", "misspelt"),
    [
        ("fp8", "fp6_e3m2", "int8", "activations fp8 with weights in int8", "fp9"),
        ("int8", "int8", "fp6_e2m3", "activations int8 with weights in fp6_e2m3:row:float16: .*integer", "int7"),
    ],
)
def test_what_cannot_be_multiplied_is_named_and_nothing_changes(
    kind: str, good: str, bad: str, near: str, misspelt: str
) -> None:
    model = torch.nn.Sequential(nn.PackedLinear.from_packed(packed(good)), nn.PackedLinear.from_packed(packed(bad)))
    with pytest.raises(UnsupportedError, match=rf"^1: {near}"):
        replace.multiply_with(model, kind)
    assert model[0].activations == "16bit"
    said = rf"activations '{misspelt}', did you mean '{kind}'\?: use 16bit, fp8, int8 or int8:g128"
    with pytest.raises(InputError, match=said):
        replace.multiply_with(model, misspelt)
    with pytest.raises(UnsupportedError, match="group size 16 is not a multiple of 32"):
        ops.preferred_layout(get_scheme(good, 16), torch.float16, torch.device("cpu"), kind)


@pytest.mark.parametrize(("kind", "name", "group_size"), [*KINDS, ("int8", "int8", None)])
def test_what_is_chosen_is_compiled_and_only_where_the_chip_has_it(
    kind: str, name: str, group_size: int | None
) -> None:
    activations = Activations.of(kind)
    packing = Packing.beside(activations, torch.float16, get_scheme(name, group_size))
    names = {source.name for source in family.quantized_sources(packing, "float16", H200)}
    for n in (1, 16, 17, 64, 65, 300, 5000):
        problem = tune.LinearProblem.of(packing, (4096, 4096), n, activations=activations)
        config = tune.choose(problem, H200)
        assert config.schedule == tune.SM90
        assert config.activations is activations
        assert sm90.box_rows(config, n) <= n
        assert family.fused_source(packing, "float16", config).name in names
    assert not list(family.quantized_sources(packing, "float16", CHIPS["NVIDIA A100"]))


def test_a_kernel_for_whole_numbers_does_not_take_a_weight_that_is_packed_for_floats() -> None:
    packing = Packing.beside(Activations.INT8, torch.float16, get_scheme("int8"))
    problem = tune.LinearProblem.of(packing, (4096, 4096), 16, activations=Activations.INT8)
    with pytest.raises(ValueError, match="does not meet"):
        family.fused_source(Packing.of(get_scheme("fp6_e3m2"), "float8_e4m3fn"), "float16", tune.choose(problem, H200))


def test_the_layouts_have_names_of_their_own() -> None:
    layouts = [layout_of(kind, packed(name, group_size)) for kind, name, group_size in KINDS]
    assert layouts == [dispatch.E4M3_LAYOUT, dispatch.INT8_LAYOUT, dispatch.INT8_GROUPS_LAYOUT]
