"""Masks by one score a weight: its magnitude, or the outputs that it makes (Wanda)."""

from __future__ import annotations

import torch

from tersor.compress.hessian import Hessian
from tersor.compress.prune.pattern import Pattern


def magnitude_mask(rows: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Return the mask that keeps the largest weights, bool [OC, IC].

    Args:
        rows: float32 [OC, IC].
        pattern: which masks are allowed.
    """
    return pattern.choose(rows.abs())


def wanda_mask(rows: torch.Tensor, hessian: Hessian, pattern: Pattern) -> torch.Tensor:
    """Return the mask that keeps the largest |w_ij| ||x_j||, bool [OC, IC] (Wanda, arXiv 2306.11695, equation 1).

    The paper compares weights within a row: `Pattern.scope` says whether that is done.

    Args:
        rows: float32 [OC, IC].
        hessian: of the inputs; its diagonal, damping included, has their squared norms.
        pattern: which masks are allowed.
    """
    return pattern.choose(rows.abs() * hessian.natural.diagonal().sqrt())
