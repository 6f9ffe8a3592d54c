"""How many zeros does each matrix of a model get? As many as what all of them cost says, none far from the mean.

A weight costs what the model loses without it, to second order and each weight for itself: half of E[g^2] w^2 E[x^2],
g the gradient of its output feature with labels drawn from the model, x its input channel (`compress.salience` has the
same for rounding errors). One threshold for the whole model would make the cheapest weights zero, whichever matrix they
are in; a matrix is kept near the share asked for because what its zeros cost together is more than the sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

MOST_APART = 0.2
"""How far the share of a matrix may be from the one asked for: 0.2 loses 7 % less than 0.1 (28 M parameters, 50 %)."""

_OCTAVES, _STEPS = 128, 16
_LOWEST = -96
BINS = _OCTAVES * _STEPS
"""Counters of costs, sixteen an octave from 2^-96 on; the first and the last also count what is beyond them."""


def cost_counts(weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Return how many weights cost how much, int64 [BINS].

    Args:
        weight: float32 [OC, IC].
        inputs: float [IC], the mean square of each input channel.
        outputs: float [OC], the mean square of the gradient of each output feature.
    """
    cost = weight.square() * inputs.to(weight) * outputs.to(weight).unsqueeze(1) * 0.5
    place = ((cost.log2() - _LOWEST) * _STEPS).clamp(0, BINS - 1).long()
    return torch.bincount(place.flatten(), minlength=BINS)


def allocate(counts: Mapping[str, torch.Tensor], sparsity: float, apart: float = MOST_APART) -> dict[str, float]:
    """Return the share of zeros of every matrix, with the share asked for over all of their weights.

    Args:
        counts: name of a matrix -> `cost_counts`.
        sparsity: the share of zeros over all matrices.
        apart: how far a share may be from it.
    """
    apart = min(apart, sparsity / 2, (1 - sparsity) / 2)
    names, every = list(counts), torch.stack([counts[name] for name in counts]).double().cpu()
    sizes = every.sum(dim=1)
    shares = every.cumsum(dim=1) / sizes.unsqueeze(1)
    shares = torch.cat([torch.zeros(len(names), 1, dtype=torch.float64), shares], dim=1)
    shares = shares.clamp(sparsity - apart, sparsity + apart)
    means = ((shares * sizes.unsqueeze(1)).sum(dim=0) / sizes.sum()).tolist()
    above = next(bin for bin, mean in enumerate(means) if mean >= sparsity)
    if above == 0:
        found = shares[:, 0]
    else:
        part = (sparsity - means[above - 1]) / (means[above] - means[above - 1])
        found = shares[:, above - 1].lerp(shares[:, above], part)
    return dict(itertools.zip_longest(names, found.tolist()))
