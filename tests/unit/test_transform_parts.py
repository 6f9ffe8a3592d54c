"""What transforms are made of: rotations of any size, norms that are asked, a search of scales, steps of norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tersor.compress import quantize_rtn
from tersor.compress.awq import Readers
from tersor.compress.norms import Steps, channel_distance
from tersor.compress.rotation import Rotation
from tersor.formats import Assignment, Mix, get_scheme
from tersor.integrations.transformers.norm_form import NormForm, norm_form


@pytest.mark.parametrize("size", [1, 2, 45, 64, 96, 576])
def test_a_rotation_is_orthogonal_flat_and_undone_by_its_rows(size: int) -> None:
    rotation = Rotation.of(size, 7)
    matrix = rotation.columns(torch.eye(size))
    assert float((matrix @ matrix.T - torch.eye(size)).abs().max()) < 1e-5
    assert float(matrix.abs().max()) <= 1.4143 * size**-0.5
    weight = torch.randn(size, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotation.rows(weight), matrix.T @ weight, atol=1e-5)
    assert torch.equal(Rotation.of(size, 7).signs, rotation.signs)


def test_a_rotation_of_heads_turns_each_alone() -> None:
    rotation, x = Rotation.of(4, 0), torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    whole = rotation.columns(x)
    assert all(torch.allclose(whole[:, at : at + 4], rotation.columns(x[:, at : at + 4])) for at in (0, 4, 8))


@pytest.mark.parametrize(
    ("module", "form"),
    [
        (LlamaRMSNorm(24), NormForm(0.0, True)),
        (GemmaRMSNorm(24), NormForm(1.0, True)),
        (nn.LayerNorm(24), NormForm(0.0, False)),
        (nn.LayerNorm(24, elementwise_affine=False), None),
        (nn.PReLU(24), None),
        (nn.Linear(24, 24), None),
    ],
)
def test_a_norm_is_known_by_what_it_computes(module: Any, form: NormForm | None) -> None:
    assert norm_form(module) == norm_form(module.to("meta")) == form


def loud(channels: int = 32, oc: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight, and the second moments of inputs of which one channel is fifty times the others."""
    drawing = torch.Generator().manual_seed(0)
    x = torch.randn(200, channels, generator=drawing)
    x[:, 3] *= 50
    return torch.randn(oc, channels, generator=drawing), x.T @ x / 200


def test_scales_found_lose_less_by_the_layers_own_objective() -> None:
    weight, hessian = loud()
    scheme = get_scheme("int3")
    readers = Readers([(weight, scheme)], hessian)
    found = readers.search()
    assert found.exponent > 0 and found.after < 0.6 * found.before
    columns = readers.spread(found.scales)
    error = quantize_rtn(weight * columns, scheme).dequantize() / columns - weight
    assert found.after == pytest.approx(float(((error @ hessian) * error).sum()), rel=1e-4)
    assert found.before == pytest.approx(readers.loss(torch.ones(32)))


def test_scales_are_searched_by_the_recipe_that_chooses_codes() -> None:
    drawing = torch.Generator().manual_seed(2)
    mixed = torch.randn(400, 6, generator=drawing) @ torch.randn(6, 32, generator=drawing)
    x = (mixed + 0.1 * torch.randn(400, 32, generator=drawing)) * torch.rand(32, generator=drawing).mul(3).exp()
    weight, hessian = torch.randn(24, 32, generator=drawing), x.T @ x / 400
    scheme = get_scheme("int3")
    found = [Readers([(weight, scheme)], hessian, recipe=recipe).search() for recipe in ("rtn", "gptq")]
    judge = Readers([(weight, scheme)], hessian, recipe="gptq")
    assert found[0].exponent > 0 and judge.loss(found[0].scales) > found[1].after
    assert found[1].after <= found[1].before < found[0].before


def test_channels_made_of_one_share_a_scale() -> None:
    weight, hessian = loud()
    source = torch.arange(32) % 8
    readers = Readers([(weight, get_scheme("int3"))], hessian, source)
    found = readers.search()
    assert found.scales.shape == (8,) and found.exponent > 0 and int(found.scales.argmax()) == 3
    assert torch.equal(readers.spread(found.scales), found.scales[source])


def test_rows_of_a_mix_are_rounded_by_their_levels() -> None:
    weight, hessian = loud()
    mix = Mix((get_scheme("int3"), get_scheme("int8")))
    both = Readers([(weight, Assignment(mix, tuple([0] * 10 + [1] * 14)))], hessian)
    apart = [Readers([(weight[:10], mix.levels[0])], hessian), Readers([(weight[10:], mix.levels[1])], hessian)]
    one = torch.ones(32)
    assert both.loss(one) == pytest.approx(sum(readers.loss(one) for readers in apart))


@pytest.mark.parametrize("hessian", [torch.zeros(32, 32), torch.eye(32)])
def test_inputs_that_are_all_alike_or_all_dead_ask_for_no_scales(hessian: torch.Tensor) -> None:
    found = Readers([(loud()[0], get_scheme("int3"))], hessian).search()
    assert found.exponent == 0 and torch.equal(found.scales, torch.ones(32)) and found.after == found.before


def test_a_dead_channel_among_others_gets_a_finite_scale() -> None:
    weight, hessian = loud()
    hessian[5] = hessian[:, 5] = 0
    scales = Readers([(weight, get_scheme("int3"))], hessian).search().scales
    assert bool(scales.isfinite().all()) and bool((scales > 0).all())


def test_steps_lower_the_distance_of_channels() -> None:
    drawing = torch.Generator().manual_seed(0)
    x, gains = torch.randn(64, 8, generator=drawing), torch.rand(8, generator=drawing) + 0.5
    value = torch.ones(8)
    steps = Steps([value], [0.05])
    before = float(channel_distance(x * value, x * gains))
    for _ in range(40):
        given = value.clone().requires_grad_(True)
        steps.step(torch.autograd.grad(channel_distance(x * given, x * gains), [given]))
    assert float(channel_distance(x * value, x * gains)) < 0.2 * before
    assert float(channel_distance(x + 1, x)) == pytest.approx(1, abs=1e-5)
