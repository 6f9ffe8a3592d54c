"""What outliers add to a product, in one small kernel ahead of the fused one of the dense part."""

from __future__ import annotations

import functools

import torch

from tersor.kernels import jit
from tersor.layouts import PackedWeight
from tersor.ops import current, tensors
from tersor.ops.norm import TARGETS, launched_early




def add(x: torch.Tensor, weight: PackedWeight, residual: torch.Tensor | None) -> torch.Tensor:
    """Return x @ outliers^T + residual, summed in float32 and rounded once to x's dtype, [..., OC].

    Args:
        x: [..., IC] float16 or bfloat16 on a GPU that has kernels; at least one token.
        weight: packed weight [OC, IC] with outliers.
        residual: [..., OC] in x's dtype, or `None`.
    """
    raise NotImplementedError
