"""The mask of ALPS (arXiv 2406.07831): the loss and the number of zeros pull at each weight until they agree.

ADMM splits the weights in two: W makes the loss small, D has the zeros, and V is what holds them together. Channels are
scaled to one squared norm first, so that one penalty fits all of them.
"""

from __future__ import annotations

import torch

from tersor.compress.hessian import Hessian
from tersor.compress.prune.pattern import Pattern

_PENALTY = 0.1
"""The first penalty, relative to the scaled diagonal, which is 1."""

_EVERY = 3
"""Steps between changes of the penalty (section 3.2)."""

_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Share of the mask that changed since the last look -> by what the penalty grows."""

_MOST = 300
"""Steps at most: the penalty has grown by 10^4 at least then, and masks have stood still long before."""


def admm_mask(rows: torch.Tensor, hessian: Hessian, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a mask by ADMM (section 3.1 and algorithm 1 of the paper).

    W = (H + p I)^-1 (H T - V + p D), D = W + V / p with all but the largest set to zero, V = V + p (W - D); the penalty
    p grows until the mask stands still.

    Args:
        rows: float32 [OC, IC], the weights wanted.
        hessian: of the inputs.
        pattern: which masks are allowed.

    Returns:
        The mask, bool [OC, IC], and D of the last step, float32 [OC, IC], zero where the mask is false.
    """
    norms = hessian.natural.diagonal().sqrt()
    matrix = hessian.natural / norms.unsqueeze(1) / norms
    target = rows * norms
    wanted = target @ matrix
    penalty, inverse = _PENALTY, _inverse(matrix, _PENALTY)
    dual = torch.zeros_like(target)
    kept = pattern.choose(target.abs())
    split = target * kept
    before = kept
    for step in range(1, _MOST + 1):
        weights = (wanted - dual + penalty * split) @ inverse
        moved = weights + dual / penalty
        kept = pattern.choose(moved.abs())
        split = moved * kept
        dual.add_(weights - split, alpha=penalty)
        if step % _EVERY:
            continue
        changed = int((kept != before).sum()) / max(1, int(kept.sum()))
        if changed == 0:
            break
        before = kept
        penalty *= next(growth for share, growth in _GROWTH if changed >= share)
        inverse = _inverse(matrix, penalty)
    return kept, split / norms


def _inverse(matrix: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return (matrix + penalty I)^-1, symmetric."""
    damped = matrix.clone()
    damped.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
