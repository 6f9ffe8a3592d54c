"""The bound by which GPU tests hold sums of e4m3 covers the tensor cores' arithmetic, and not much more."""

from __future__ import annotations

import pytest
import torch
from helpers import pruned
from helpers.e4m3_sums import SETTLED, e4m3_dropped, e4m3_sums
from helpers.sparse_products import skewed_mask

from tersor.formats import Activations, get_scheme


def codes(rows: int, ic: int, seed: int) -> torch.Tensor:
    """Return quantised random numbers, float64 [rows, ic]."""
    return Activations.E4M3.quantize(pruned.random(rows, ic, seed))[0].double()


@pytest.mark.parametrize("blocks", [1, 3, SETTLED])
def test_sums_of_every_length_are_within_the_bound(blocks: int) -> None:
    x, weight = codes(6, 1500, 1), codes(20, 1500, 2)
    weight[7:] *= pruned.kept(13, 1500, 0.1)
    weight[10] = x[3]  # products of one sign
    weight[11] = 0
    exact, bound = x @ weight.T, e4m3_dropped(x, weight)
    error = (e4m3_sums(x, weight, blocks) - exact).abs()
    assert bool((error <= bound).all()) and float(error[3, 10]) > 0
    assert not bool(error[:, 11].any()) and not bool(bound[:, 11].any())


def test_a_bound_is_a_small_part_of_what_independent_numbers_add_up_to() -> None:
    x, weight = codes(6, 3000, 1), codes(20, 3000, 2)
    bound, exact = e4m3_dropped(x, weight), x @ weight.T
    assert float(bound.max()) < 0.3 * float(exact.square().mean().sqrt())
    assert torch.allclose(e4m3_dropped(3 * x, 0.5 * weight), 1.5 * bound, rtol=1e-12)


def test_the_arithmetic_is_that_of_a_gpu() -> None:
    """An H200 gave this number for the third token and row; row and token are the same random numbers."""
    weight, decoded = pruned.sparse(pruned.random(704, 3000) / 50, skewed_mask(704, 3000), get_scheme("fp6_e3m2"))
    x = torch.randn(65, 3000, generator=torch.Generator().manual_seed(0)).half()
    residual = torch.randn(65, 704, generator=torch.Generator().manual_seed(1)).half()[3, 3].double()
    quantised, x_scale = Activations.E4M3.quantize(x.float())
    assert weight.scale is not None
    scale = weight.scale[3].double()
    row, token = decoded[3:4].double() / scale, quantised[3:4].double()
    both = x_scale[3].double() * scale
    y = e4m3_sums(token, row) * both + residual
    assert float(y.half()) == 58.90625 and float(e4m3_sums(token, row, 1).mul(both).add(residual).half()) == 59.125
    error = float((y - (token @ row.T * both + residual)).abs())
    assert error < float(e4m3_dropped(token, row) * both) < 15 * error
