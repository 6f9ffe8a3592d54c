"""Sums of a calibration: batches and parts add up to what all tokens give at once."""

from __future__ import annotations

import pytest
import torch

from tersor.compress.statistics import (
    HESSIAN,
    OUTPUT_HESSIAN,
    SHIFT,
    LayerSums,
    Moments,
    bfloat16_parts,
)
from tersor.errors import InputError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal random numbers, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, ORIGINAL, WEIGHT = random(60, 8), random(60, 8, seed=1), random(60, seed=2).abs()
GRADIENTS = random(60, 6, seed=3)


def test_batches_add_up_to_the_mean_over_all_tokens() -> None:
    sums = LayerSums.of(8, shift=True, outputs=6)
    for part in (slice(0, 10), slice(10, 60)):
        sums.add(X[part].view(2, -1, 8), WEIGHT[part].view(2, -1), ORIGINAL[part].view(2, -1, 8))
        sums.add_gradients(GRADIENTS[part].to(torch.float64))
    weighted = (X * WEIGHT.unsqueeze(1)).double()
    means = sums.statistics()
    assert sums.tokens == 60
    assert torch.allclose(means[HESSIAN].double(), weighted.T @ X.double() / 60, atol=1e-6)
    assert torch.allclose(means[SHIFT].double(), (ORIGINAL - X).T.double() @ weighted / 60, atol=1e-6)
    assert torch.allclose(means[OUTPUT_HESSIAN], GRADIENTS.T @ GRADIENTS / 60, atol=1e-6)
    assert {mean.dtype for mean in means.values()} == {torch.float32}


def test_pieces_are_the_blocks_along_the_diagonal() -> None:
    whole, pieces = Moments(6), Moments(6, pieces=3)
    for moments in (whole, pieces):
        moments.add(GRADIENTS, WEIGHT)
    expected = torch.stack([whole.mean()[i : i + 2, i : i + 2] for i in (0, 2, 4)])
    assert torch.allclose(pieces.mean(), expected)
    with pytest.raises(InputError, match="6 channels are not 4 pieces"):
        Moments(6, pieces=4)


def test_two_numbers_in_bfloat16_are_one_in_float32_to_17_bits() -> None:
    x = random(200, 4) * torch.logspace(-20, 20, 200).unsqueeze(1)
    parts = bfloat16_parts(x)
    assert len(parts) == 2 and {part.dtype for part in parts} == {torch.bfloat16}
    assert float(((sum(part.double() for part in parts) - x).abs() / x.abs()).max()) <= 2.0**-17
    assert bfloat16_parts(parts[0])[0] is parts[0] and len(bfloat16_parts(parts[0])) == 1


def test_many_small_batches_lose_nothing_against_one() -> None:
    large, small = Moments(2), Moments(2)
    x = torch.full((20000, 2), 1e-3)
    x[0] = 1e3
    large.add(x.double())
    for part in x.split(10):
        small.add(part)
    assert float(small.total[0, 0, 0]) == pytest.approx(1e6 + 19999e-6, rel=1e-9)
    assert small.tokens == large.tokens == 20000


def test_sums_of_parts_merge_to_those_of_all() -> None:
    first, second, whole = (LayerSums.of(8, outputs=6, pieces=2) for _ in range(3))
    first.add(X[:20])
    second.add(X[20:])
    second.add_gradients(GRADIENTS)
    for part in (X[:20], X[20:]):
        whole.add(part)
    whole.add_gradients(GRADIENTS)
    first.merge(second)
    assert first.tokens == 60 and first.sums[OUTPUT_HESSIAN].tokens == 60
    for name, mean in whole.statistics().items():
        assert torch.equal(first.statistics()[name], mean)


def test_inputs_of_the_original_model_are_given_where_their_shift_is_kept_and_nowhere_else() -> None:
    with pytest.raises(InputError, match="inputs of two models"):
        LayerSums.of(8, shift=True).add(X)
    with pytest.raises(InputError, match="inputs of two models"):
        LayerSums.of(8).add(X, original=ORIGINAL)
