"""How the tensors of a call have to lie for a kernel, and what a call without products gives."""

from __future__ import annotations

import torch

from tersor.ops import current
from tersor.ops.gates import Gate


def empty_result(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, gate: int, oc: int
) -> torch.Tensor:
    """Return the result where x or the weight has no elements: that of the reference for sums of zero."""
    y = x.new_zeros(*x.shape[:-1], oc, dtype=torch.float32)
    if bias is not None:
        y = y + bias
    if gate:
        y = Gate(gate).of_rows(y)
    return (y if residual is None else y + residual).to(x.dtype)


def output(shape: torch.Size, n: int, oc: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised [..., OC] on the current device, for activations of a shape."""
    if len(shape) == 2:
        return current.empty((n, oc), (oc, 1), dtype)
    if len(shape) == 3:
        return current.empty((shape[0], shape[1], oc), (shape[1] * oc, oc, 1), dtype)
    return current.empty((n, oc), (oc, 1), dtype).view(*shape[:-1], oc)


def rows_of(x: torch.Tensor, ic: int) -> torch.Tensor:
    """Return x as [N, IC], contiguous along IC and without overlapping rows; copied only where it lies otherwise."""
    tokens = x.reshape(-1, ic)
    return tokens if tokens.stride(1) == 1 and tokens.stride(0) >= ic else tokens.contiguous()


def aligned_rows(x: torch.Tensor, ic: int) -> torch.Tensor:
    """Return a copy of x [N, IC] whose rows start on 16 bytes."""
    tokens = x.reshape(-1, ic)
    copy = x.new_empty(tokens.shape[0], -(-ic // 8) * 8)[:, :ic]
    return copy.copy_(tokens)


def contiguous(residual: torch.Tensor) -> torch.Tensor:
    """Return a contiguous residual that starts on 16 bytes, as kernels read it; copied only where it lies otherwise."""
    if residual.is_contiguous() and residual.data_ptr() % 16 == 0:
        return residual
    return residual.clone(memory_format=torch.contiguous_format)
