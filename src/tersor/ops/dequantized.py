"""Many tokens where no fused kernel takes them: slices of the weight are decoded for cuBLAS, whose sums are scaled.

A weight that keeps outliers is decoded whole, scales and outliers included, where that is predicted to take less time
than to gather what outliers meet (`tune.decodes_beside`); then cuBLAS rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from tersor.kernels import dense, jit, tune
from tersor.kernels.jit import Function
from tersor.layouts import PackedWeight
from tersor.layouts.blocks import BLOCK_OC, UNIT_OC
from tersor.layouts.gated import gated_channels
from tersor.layouts.outliers import rounds_of
from tersor.ops import current
from tersor.ops.prepared import WeightType

_SCRATCH_BYTES = 64 << 20
"""Decoded weights held at a time for a product by cuBLAS; a matrix beyond that is served in slices of rows."""


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    of: WeightType,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    """Return the result [N, outputs] of x [N, IC] with a weight in kernel tiles; arguments as in `serve.linear`."""
    assert of.packing is not None
    finish = jit.get(dense.epilogue_source(of.packing, gate), x.device)
    slices = _slices(data, scale, of, x.dtype)
    return finished(x, slices, finish, scale.data_ptr(), bias, of.oc, residual, gate, of.factor)


def finished(
    x: torch.Tensor,
    slices: Iterable[tuple[int, torch.Tensor]],
    finish: Function,
    scale: int,
    bias: torch.Tensor | None,
    oc: int,
    residual: torch.Tensor | None,
    gate: int,
    factor: float,
) -> torch.Tensor:
    """Return the result [N, outputs] of x [N, IC] with a weight that comes in slices.

    Args:
        x, bias, residual, gate: as in `serve.linear`.
        slices: first row and decoded rows of each.
        finish: the kernel that makes results of float32 sums (`dense.epilogue_source`).
        scale, factor: address of what it multiplies sums of a row by, and a number for all of them.
        oc: rows of the weight.
    """
    n, stream = x.shape[0], current.stream(x.get_device())
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(n, gated_channels(oc) if gate else oc)
    for first_oc, decoded in slices:
        sums = torch.mm(x, decoded.T, out_dtype=torch.float32)
        for first in range(0, n, dense.MOST_FINISHED):
            dense.launch_epilogue(
                finish,
                stream,
                sums=sums[first:].data_ptr(),
                scale=scale,
                bias=0 if bias is None else bias.data_ptr(),
                residual=0 if residual is None else residual[first:].data_ptr(),
                y=y[first:].data_ptr(),
                first_oc=first_oc,
                slice_oc=decoded.shape[0],
                oc=oc,
                n=min(dense.MOST_FINISHED, n - first),
                factor=factor,
            )
    return y


def with_outliers(weight: PackedWeight, of: WeightType) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row and the decoded rows, [rows, IC], of each slice of a weight with arranged outliers.

    Rows are in the dtype that the weight is laid out for, which scaled weights are rounded to; a slice overwrites the
    last one. `of` is the type of the dense part.
    """
    kept, (oc, ic), index = weight.arranged, weight.shape, weight.data.get_device()
    outliers = weight.scheme.outliers
    assert kept is not None and outliers is not None and of.packing is not None
    decode = jit.get(dense.dequantize_source(of.packing, rounds_of(outliers, ic)), index)
    height = tune.slice_rows(oc, ic)
    scratch = torch.empty(height, ic, dtype=getattr(torch, of.packing.target), device=weight.data.device)
    for first_oc in range(0, oc, height):
        slice_oc = min(height, oc - first_oc)
        dense.launch_dequantize(
            decode,
            current.stream(index),
            weight=weight.data.data_ptr(),
            scale=weight.scale.data_ptr(),
            scratch=scratch.data_ptr(),
            first_block=first_oc // BLOCK_OC,
            oc=slice_oc,
            ic=ic,
            factor=of.factor,
            kept=kept.data_ptr(),
            weight_oc=oc,
        )
        yield first_oc, scratch[:slice_oc]


def input_grad(grad: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, of: WeightType) -> torch.Tensor:
    """Return grad @ W, [N, IC], of grad [N, OC] and a weight in kernel tiles for grad's dtype.

    Scaled weights are rounded to grad's dtype; their products are added in float32 and rounded once.
    """
    assert of.packing is not None
    slices = _slices(data, scale, of, grad.dtype)
    if not of.packing.scales_sums:
        return added_up(grad, slices)
    row_scales = scale.view(torch.float32).view(-1, of.packing.scale_bytes // 4)[: of.oc, :1] * of.factor
    # In float32, rounded once.
    return added_up(grad, ((at, rows.mul_(row_scales[at : at + rows.shape[0]])) for at, rows in slices))


def added_up(grad: torch.Tensor, slices: Iterable[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Return grad [N, OC] @ W, [N, IC], of a weight that comes in slices: first row and decoded rows of each."""
    total: torch.Tensor | None = None
    for first_oc, decoded in slices:
        last_oc = first_oc + decoded.shape[0]
        part = torch.mm(grad[:, first_oc:last_oc], decoded, out_dtype=torch.float32)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(grad.dtype)


def _slices(
    data: torch.Tensor, scale: torch.Tensor, of: WeightType, dtype: torch.dtype
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row and the decoded rows, [rows, IC] in `dtype`, of each slice; a slice overwrites the last one.

    Rows are without their scale where there is one a row, and without `WeightType.factor` then.
    """
    assert of.packing is not None
    oc, ic = of.oc, of.ic
    decode = jit.get(dense.dequantize_source(of.packing), data.get_device())
    stream = current.stream(data.get_device())
    height = max(1, _SCRATCH_BYTES // (2 * ic) // UNIT_OC) * UNIT_OC
    scratch = torch.empty(min(height, oc), ic, dtype=dtype, device=data.device)
    for first_oc in range(0, oc, height):
        slice_oc = min(height, oc - first_oc)
        dense.launch_dequantize(
            decode,
            stream,
            weight=data.data_ptr(),
            scale=scale.data_ptr(),
            scratch=scratch.data_ptr(),
            first_block=first_oc // BLOCK_OC,
            oc=slice_oc,
            ic=ic,
            factor=of.factor,
        )
        yield first_oc, scratch[:slice_oc]
