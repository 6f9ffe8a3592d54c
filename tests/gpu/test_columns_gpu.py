"""Columns on a GPU: the kernel gives the values of the torch code, and sums of bfloat16 are what float64 says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from tersor import formats, ops
from tersor.compress import sweeps
from tersor.compress.gptq import quantize_gptq
from tersor.compress.grid import Grid
from tersor.compress.hessian import INPUT_DAMPING, Hessian, exact_products
from tersor.compress.prune import Pattern, prune
from tersor.compress.refine import Layer
from tersor.compress.statistics import HESSIAN, OUTPUT_HESSIAN, SHIFT, LayerSums
from tersor.formats import Encoded, Scheme

Made = TypeVar("Made")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SCHEMES = [
    formats.get_scheme("uint4", 128),
    formats.get_scheme("int3"),
    formats.get_scheme("fp5_e2m2"),
    formats.get_scheme("fp8_e4m3", 64),
    formats.get_scheme("mxfp4_e2m1"),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal random numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def moments(channels: int, seed: int) -> torch.Tensor:
    """Return the second moments of channels that depend on each other."""
    mixing = random(channels, channels, seed=seed) * torch.linspace(0.1, 2, channels, device="cuda")
    x = random(4 * channels, channels, seed=seed + 1) @ mixing / channels**0.5
    return x.T @ x / len(x)


@pytest.mark.parametrize("rows", [1, 16, 1000])
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.key)
def test_columns_get_the_values_that_the_torch_code_gives_them(scheme: Scheme, rows: int) -> None:
    channels = 640
    target = random(channels, rows)
    with exact_products():
        hessian = Hessian.of(moments(channels, 2), INPUT_DAMPING, HESSIAN)
        grid = Grid.of(scheme, channels, torch.float32, target.device)
        scale, zero_point = (part.T.contiguous() for part in grid.search(target.T, hessian.weights()))
        groups = torch.div(hessian.order * grid.groups, channels, rounding_mode="floor")
        found = both(lambda: sweeps.round_columns(target, scale, zero_point, grid, hessian, groups))
        choice = sweeps.Choice(found[1], scale, zero_point)
        slopes = hessian.ordered @ (target - choice.decoded(groups))
        lower = both(lambda: sweeps.descend_columns(choice, slopes, grid, hessian, groups))
    for kernel, plain in (found, lower):  # a number halfway between two values, to the last bit, may go to either
        assert int((kernel != plain).any(dim=0).sum()) <= rows // 16
        assert float(kernel.std()) > 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.key)
def test_what_a_mask_makes_zero_is_zero_and_moves_on_as_by_the_torch_code(scheme: Scheme) -> None:
    channels, rows = 640, 100
    target, kept = random(channels, rows), (random(channels, rows, seed=3) > 0).float()
    with exact_products():
        hessian = Hessian.of(moments(channels, 2), INPUT_DAMPING, HESSIAN)
        layer = Layer.of(Grid.of(scheme, channels, torch.float32, target.device), hessian, kept.T > 0)
        assert layer.kept is not None
        gone = layer.kept == 0
        found = both(lambda: layer.round(target).choice.values)
        start = layer.round(target)
        lower = both(lambda: layer.polish(target, start, 1).choice.values)
    for kernel, plain in (found, lower):
        assert bool((kernel[gone] == 0).all()) and float(kernel.std()) > 0
        assert int((kernel != plain).any(dim=0).sum()) <= rows // 16


def test_pruned_weights_and_outliers_lose_as_much_as_by_the_torch_code() -> None:
    weight, statistics = random(200, 512), {HESSIAN: moments(512, 2), SHIFT: 0.02 * moments(512, 4)}
    beside = Scheme(formats.get("int4"), 128, outliers=formats.Outliers(1, "float16"))
    few_bits = formats.get_scheme("fp6_e2m3")
    calls: tuple[Callable[[], Encoded | None], ...] = (
        lambda: quantize_gptq(weight, beside, statistics),
        lambda: prune(weight, Pattern(0.5), "admm", statistics, scheme=few_bits).encoded,
    )
    for call in calls:
        found, plain = both(call)
        assert found is not None and found.objective is not None
        assert plain is not None and plain.objective is not None
        assert found.objective.after == pytest.approx(plain.objective.after, rel=0.03)
        assert found.objective.after < found.objective.before


def both(call: Callable[[], Made]) -> tuple[Made, Made]:
    """What the kernel and what the torch code makes of a call."""
    with ops.using(reference=True):
        expected = call()
    return call(), expected


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=Scheme.key)
def test_a_whole_weight_loses_as_much_as_by_the_torch_code(scheme: Scheme) -> None:
    weight = random(200, 512)
    statistics = {HESSIAN: moments(512, 2), SHIFT: 0.02 * moments(512, 4), OUTPUT_HESSIAN: moments(200, 6)}
    found = quantize_gptq(weight, scheme, statistics)
    with ops.using(reference=True):
        plain = quantize_gptq(weight, scheme, statistics)
    assert found.objective is not None and plain.objective is not None
    assert found.objective.after == pytest.approx(plain.objective.after, rel=0.03)
    on_host = quantize_gptq(weight.cpu(), scheme, {name: one.cpu() for name, one in statistics.items()})
    assert on_host.objective is not None
    assert found.objective.after == pytest.approx(on_host.objective.after, rel=0.03)
    assert found.objective.after < 0.5 * found.objective.before


def test_sums_of_bfloat16_err_by_less_than_a_hundredth_of_the_damping() -> None:
    channels, tokens = 192, 40000
    x = (random(tokens, channels) * torch.linspace(0.01, 30, channels, device="cuda")).bfloat16()
    original = (x.float() + 0.05 * random(tokens, channels, seed=1)).bfloat16()
    weight = random(tokens, seed=2).abs()
    wide = x.double()
    for own in (None, weight):
        sums = LayerSums.of(channels, shift=True, outputs=channels, pieces=3, device="cuda")
        for part in torch.arange(tokens, device="cuda").split(16384):
            sums.add(x[part], None if own is None else own[part], original[part])
            sums.add_gradients(original[part])
        means = sums.statistics()
        left = wide if own is None else wide * own.double().unsqueeze(1)
        shift = (original.double() - wide) * (1.0 if own is None else own.double().unsqueeze(1))
        gradients = original.double().view(tokens, 3, -1).permute(1, 2, 0)
        expected = {
            HESSIAN: left.T @ wide / tokens,
            SHIFT: shift.T @ wide / tokens,
            OUTPUT_HESSIAN: gradients @ gradients.mT / tokens,
        }
        for name, mean in means.items():
            sizes = expected[name if name != SHIFT else HESSIAN].diagonal(dim1=-2, dim2=-1).sqrt()
            most = sizes.unsqueeze(-1) * sizes.unsqueeze(-2)
            assert float(((mean.double() - expected[name]).abs() / most).max()) < 1e-4, name
