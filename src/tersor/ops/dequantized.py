"""Many tokens where no fused kernel takes them: slices of the weight are decoded for cuBLAS, whose sums are scaled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tersor.kernels import dense, jit
from tersor.layouts.blocks import BLOCK_OC, UNIT_OC
from tersor.layouts.gated import gated_channels
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
    oc, n = of.oc, x.shape[0]
    finish = jit.get(dense.epilogue_source(of.packing, gate), x.device)
    stream = current.stream(x.get_device())
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(n, gated_channels(oc) if gate else oc)
    for first_oc, decoded in _slices(data, scale, of, x.dtype):
        sums = torch.mm(x, decoded.T, out_dtype=torch.float32)
        dense.launch_epilogue(
            finish,
            stream,
            sums=sums.data_ptr(),
            scale=scale.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            residual=0 if residual is None else residual.data_ptr(),
            y=y.data_ptr(),
            first_oc=first_oc,
            slice_oc=decoded.shape[0],
            oc=oc,
            n=n,
            factor=of.factor,
        )
    return y


def input_grad(grad: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, of: WeightType) -> torch.Tensor:
    """Return grad @ W, [N, IC], of grad [N, OC] and a weight in kernel tiles for grad's dtype.

    Scaled weights are rounded to grad's dtype; their products are added in float32 and rounded once.
    """
    assert of.packing is not None
    row_scales: torch.Tensor | None = None
    if not of.packing.scales_in_block:
        row_scales = scale.view(torch.float32).view(-1, of.packing.scale_bytes // 4)[: of.oc, :1] * of.factor
    total: torch.Tensor | None = None
    for first_oc, decoded in _slices(data, scale, of, grad.dtype):
        last_oc = first_oc + decoded.shape[0]
        if row_scales is not None:
            decoded.mul_(row_scales[first_oc:last_oc])  # in float32, rounded once
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
