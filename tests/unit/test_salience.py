"""What a rounded feature costs a model, in nats: sums over batches, and a sum that predicts a KL divergence."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tersor.compress.salience import Salience, expected_kl, rounding_error, taylor
from tersor.errors import InputError, ShapeError
from tersor.formats import get_scheme

LEVELS = [get_scheme("uint4", 16), get_scheme("fp6_e2m3")]


def batch(tokens: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs [tokens, 32] and gradients [tokens, 5]."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 32, generator=random), torch.randn(tokens, 5, generator=random)


def errors() -> list[torch.Tensor]:
    """Return the rounding errors [5, 32] of one weight at both levels."""
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    return [rounding_error(weight, scheme) for scheme in LEVELS]


def test_scores_are_the_formulas_of_their_papers() -> None:
    x, grad = batch()
    delta = errors()[0]
    pulls = (grad * (x @ delta.T)).double()
    assert torch.allclose(expected_kl(x, grad, delta), (pulls**2).sum(0) / 2)
    weight_grad = grad.T @ x  # MixLLM sums the gradient of the weight first
    change = (weight_grad * delta).sum(1).double()
    assert torch.allclose(taylor(x, grad, delta), (change + change**2 / 2).abs(), rtol=1e-4)


def test_inputs_of_bfloat16_give_nearly_the_same() -> None:
    x, grad = batch(256)
    found = expected_kl(x.bfloat16(), grad.bfloat16(), errors()[0])
    torch.testing.assert_close(found, expected_kl(x, grad, errors()[0]), rtol=0.03, atol=0)


def test_batches_add_up_to_what_all_tokens_give() -> None:
    x, grad = batch()
    whole, parts, rest = (Salience(levels=2, features=5) for _ in range(3))
    whole.add(x, grad, errors())
    parts.add(x[:7], grad[:7], errors())
    rest.add(x[7:], grad[7:], errors())
    parts.merge(rest)
    assert torch.allclose(whole.mean(), parts.mean())
    assert whole.mean()[0].sum() > 4 * whole.mean()[1].sum()


def test_the_sum_predicts_the_divergence_of_a_rounded_linear() -> None:
    random = torch.Generator().manual_seed(3)
    x, weight = torch.randn(4096, 16, generator=random), torch.randn(8, 16, generator=random)
    rounded = weight + 0.02 * torch.randn(8, 16, generator=random)
    before, after = functional.log_softmax(x @ weight.T, 1), functional.log_softmax(x @ rounded.T, 1)
    divergence = (before.exp() * (before - after)).sum(1).mean()
    labels = torch.multinomial(before.exp(), 1, generator=random)
    grad = before.exp().scatter_add(1, labels, torch.full_like(labels, -1.0, dtype=torch.float32))
    found = Salience(1, 8)
    found.add(x, grad, [rounded - weight])
    # Features are taken as independent, which those of one softmax are not quite.
    assert found.mean().sum() == pytest.approx(float(divergence), rel=0.3)


def test_sizes_that_do_not_fit_and_sums_of_nothing_are_refused() -> None:
    x, grad = batch()
    found = Salience(2, 5)
    with pytest.raises(ShapeError, match=r"gradients \[24, 5\] and a rounding error \[4, 32\]"):
        expected_kl(x, grad, errors()[0][:4])
    with pytest.raises(ShapeError, match="1 rounding errors for 2 levels"):
        found.add(x, grad, errors()[:1])
    with pytest.raises(InputError, match="salience of no tokens"):
        found.mean()
    with pytest.raises(ShapeError, match="does not add to kl"):
        found.merge(Salience(2, 5, "mixllm"))
    with pytest.raises(InputError, match="unknown score 'kld', did you mean 'kl'"):
        Salience(2, 5, "kld")
