"""What outliers add to a product, in one small kernel ahead of the fused one of the dense part.

Tokens of a batch-invariant call meet outliers in the same order whatever their number, as they do in every other call.
"""

from __future__ import annotations

import functools

import torch

from tersor.kernels import jit, outliers
from tersor.layouts import PackedWeight
from tersor.ops import current, tensors
from tersor.ops.norm import TARGETS, launched_early

_sums = functools.lru_cache(1024)(outliers.prepare_sums)
_turn = functools.lru_cache(1024)(outliers.prepare_turn)


def add(x: torch.Tensor, weight: PackedWeight, residual: torch.Tensor | None) -> torch.Tensor:
    """Return x @ outliers^T + residual, summed in float32 and rounded once to x's dtype, [..., OC].

    Args:
        x: [..., IC] float16 or bfloat16 on a GPU that has kernels, at least one token.
        weight: packed weight [OC, IC] with outliers.
        residual: [..., OC] in x's dtype, or `None`.
    """
    words, kept, (oc, ic) = weight.outliers, weight.scheme.outliers, weight.shape
    assert words is not None and kept is not None
    index = x.get_device()
    if current.device() != index:
        with torch.cuda.device(index):
            return add(x, weight, residual)
    rows = tensors.rows_of(x, ic)
    n, stride, early = len(rows), rows.stride(0), launched_early(x.device)
    stream, target, tokens = current.stream(index), TARGETS[x.dtype], outliers.tile(len(rows))
    if residual is not None:
        residual = tensors.contiguous(residual)
    source, address = rows, rows.data_ptr()
    if tokens == outliers.TURNED:
        turned = outliers.turned_stride(n)
        source = current.empty((ic, turned), (turned, 1), x.dtype)  # held until the launch; then the stream's order
        turn = _turn(jit.get(outliers.turn_source(), index), ic=ic, n=n)
        turn(stream=stream, x=address, stride=stride, turned=source.data_ptr(), early=early)
        address, stride = source.data_ptr(), turned
    out = current.empty((n, oc), (oc, 1), x.dtype)
    launch = _sums(jit.get(outliers.sums_source(target, kept.dtype, tokens), index), count=words.shape[1], oc=oc, n=n)
    launch(
        stream=stream,
        x=address,
        stride=stride,
        words=words.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        out=out.data_ptr(),
        early=early,
    )
    return out.view(*x.shape[:-1], oc)
