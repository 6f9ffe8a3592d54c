"""RMS norm of the channels of a token (arXiv 1910.07467)."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x * rsqrt(mean(x^2) + eps) * (weight + offset) + residual, in float32 and rounded once to x's dtype.

    Args:
        x: [..., H].
        weight: [H].
        eps: above 0.
        offset: is added to the weights.
        residual: [..., H] in x's dtype, or `None`.
    """
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset)
    return (y if residual is None else y + residual.float()).to(x.dtype)
