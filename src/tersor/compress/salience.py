"""What does a model lose when an output feature gets a coarser code? Scores that add up over batches of tokens.

For a linear y = x W^T and a loss L, the sum over tokens of the negative log-likelihood of labels, let g = dL/dy. With a
rounding error delta_c in row c of W, L changes by a_c = sum_t g_tc (delta_c . x_t) to first order. Two scores are made
of that:

- Expected KL: S_c = mean_t g_tc^2 (delta_c . x_t)^2 / 2, in nats a token. With labels drawn from the model's own
  predictions, E[g g^T] is the Fisher information, so this is the second-order term of KL(original || rounded) where
  tokens and features are taken as independent. It adds up over features, and the sum predicts the model's KL.
- Taylor, `mixllm` by name: MixLLM's score (arXiv 2412.14590v2, section 3.2), the mean over samples of
  |a_c + a_c^2 / 2| with the text's own labels. It ranks features; it is no loss that could be divided by bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from tersor.compress.encode import DEFAULT_RECIPE, Statistics, encode
from tersor.errors import InputError, ShapeError, did_you_mean
from tersor.formats import Scheme

Summand: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Makes of inputs x [T, IC], gradients g [T, OC] and a rounding error [OC, IC] what is added to every feature's sum."""


def expected_kl(x: torch.Tensor, grad: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return sum_t g_t^2 (delta . x_t)^2 / 2 of every output feature, float64 [OC]: divide by tokens for nats a token.

    Args:
        x: inputs of the linear [T, IC], any float dtype.
        grad: gradients of the summed loss by its outputs [T, OC], on x's device.
        delta: rounded weight minus weight [OC, IC], on x's device.
    """
    return (_pulls(x, grad, delta).square().sum(dim=0, dtype=torch.float64)) / 2


def taylor(x: torch.Tensor, grad: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return |a + a^2 / 2| of every output feature for one sample, a = sum_t g_t (delta . x_t): float64 [OC].

    Args:
        x, grad, delta: as for `expected_kl`; the tokens of one sample.
    """
    change = _pulls(x, grad, delta).sum(dim=0, dtype=torch.float64)
    return (change + change.square() / 2).abs()


def _pulls(x: torch.Tensor, grad: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Return g_tc (delta_c . x_t), float32 [T, OC]; of bfloat16 inputs by a product of bfloat16, for tensor cores."""
    if x.dim() != 2 or grad.dim() != 2 or delta.dim() != 2 or grad.shape != (len(x), len(delta)):
        raise ShapeError(
            f"salience of inputs {list(x.shape)}, gradients {list(grad.shape)} and a rounding error "
            f"{list(delta.shape)}: expected [T, IC], [T, OC] and [OC, IC]"
        )
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    return (x.to(dtype) @ delta.to(dtype).T).to(torch.float32).mul_(grad)


KL, MIXLLM = "kl", "mixllm"
SCORES: dict[str, Summand] = {KL: expected_kl, MIXLLM: taylor}
"""Every score by its name: what one batch, or one sample, adds to the sum of each feature."""


def check_score(name: str) -> None:
    """Hold that there is a score of this name.

    Raises:
        InputError: there is none.
    """
    if name not in SCORES:
        raise InputError(f"unknown score {name!r}{did_you_mean(name, SCORES)} (known: {', '.join(SCORES)})")


class Salience:
    """Sums of one linear's scores, for every level a feature may have, over batches of tokens."""

    def __init__(self, levels: int, features: int, score: str = KL, device: torch.device | str = "cpu") -> None:
        """Start with sums of nothing.

        Args:
            levels: how many rounding errors each batch comes with.
            features: OC.
            score: a key of `SCORES`. A batch for `mixllm` is one sample.
            device: where the sums are kept; inputs are on it as well.

        Raises:
            InputError: no such score.
        """
        check_score(score)
        self.score = score
        self._sums = torch.zeros(levels, features, dtype=torch.float64, device=device)
        self._count = 0

    def add(
        self, x: torch.Tensor, grad: torch.Tensor, deltas: Sequence[torch.Tensor], tokens: int | None = None
    ) -> None:
        """Add a batch.

        Args:
            x, grad: as for `expected_kl`.
            deltas: the rounding error [OC, IC] of each level, in the order of the sums.
            tokens: for how many tokens these stand; of `None` for those of x.

        Raises:
            ShapeError: sizes that do not fit.
        """
        if len(deltas) != len(self._sums):
            raise ShapeError(f"{len(deltas)} rounding errors for {len(self._sums)} levels")
        for total, delta in zip(self._sums, deltas, strict=True):
            total += SCORES[self.score](x, grad, delta)
        self.saw((len(x) if self.score == KL else 1) if tokens is None else tokens)

    def saw(self, count: int) -> None:
        """Count tokens, or samples, that add nothing to the sums: those that a linear does not see."""
        self._count += count

    def merge(self, other: Salience) -> None:
        """Add what another one has summed up, of other batches of the same linear.

        Raises:
            ShapeError: it has other levels, features or another score.
        """
        if (other.score, other._sums.shape) != (self.score, self._sums.shape):
            raise ShapeError(
                f"salience {other.score} {list(other._sums.shape)} does not add to {self.score} "
                f"{list(self._sums.shape)}"
            )
        self._sums += other._sums.to(self._sums.device)
        self._count += other._count

    def mean(self) -> torch.Tensor:
        """Return the score of every level and feature, float64 [levels, OC] on the CPU: nats a token, or a sample's.

        Raises:
            InputError: nothing was added.
        """
        if not self._count:
            raise InputError("salience of no tokens: calibration gave this linear none")
        return (self._sums / self._count).cpu()


def rounding_error(
    weight: torch.Tensor, scheme: Scheme, recipe: str = DEFAULT_RECIPE, statistics: Statistics | None = None
) -> torch.Tensor:
    """Return what a scheme makes of a weight minus the weight, float32 [OC, IC] on the weight's device.

    Raises:
        As `encode` does.
    """
    return encode(weight, scheme, recipe, statistics).dequantize().sub_(weight)
