"""Norms that make up for what compression did to a block's outputs: the loss of Norm Tweaking, and steps that lower it.

Li et al., Norm Tweaking: High-performance Low-bit Quantization of Large Language Models (AAAI 2024, arXiv 2309.02784):
the weights of norms follow the gradient of the distance between the channels of two outputs in mean and variance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
"""Of Adam (arXiv 1412.6980)."""


def channel_distance(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean over channels of |difference of means| + |difference of variances|, a float32 scalar.

    Args:
        found, wanted: outputs of the compressed and the original block, [..., C].
    """
    mine, theirs = (output.flatten(0, -2).float() for output in (found, wanted))
    means = (mine.mean(dim=0) - theirs.mean(dim=0)).abs()
    variances = (mine.var(dim=0, correction=0) - theirs.var(dim=0, correction=0)).abs()
    return (means + variances).mean()


class Steps:
    """Adam's steps on float32 values."""

    def __init__(self, values: Sequence[torch.Tensor], rates: Sequence[float]) -> None:
        """Begin.

        Args:
            values: float32; they are changed in place.
            rates: about the length of a step, for each of them.
        """
        self.values, self._rates = list(values), list(rates)
        self._means = [torch.zeros_like(value) for value in self.values]
        self._squares = [torch.zeros_like(value) for value in self.values]
        self._count = 0

    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        """Take one step against gradients, of the shapes of the values."""
        self._count += 1
        first, second = (1 - beta**self._count for beta in _BETAS)
        for value, gradient, rate, mean, square in zip(
            self.values, gradients, self._rates, self._means, self._squares, strict=True
        ):
            mean.lerp_(gradient.float(), 1 - _BETAS[0])
            square.lerp_(gradient.float().square(), 1 - _BETAS[1])
            value.sub_(rate * (mean / first) / ((square / second).sqrt() + _EPSILON))
