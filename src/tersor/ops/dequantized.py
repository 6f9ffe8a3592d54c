"""Many tokens where no fused kernel takes them: slices of the weight are decoded for cuBLAS, whose sums are scaled."""

from __future__ import annotations

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
    gated: bool,
) -> torch.Tensor:
    """Return the result [N, outputs] of x [N, IC] with a weight in kernel tiles; arguments as in `serve.linear`."""
    assert of.packing is not None
    oc, ic, n = of.oc, of.ic, x.shape[0]
    decode = jit.get(dense.dequantize_source(of.packing), x.device)
    finish = jit.get(dense.epilogue_source(of.packing, gated), x.device)
    stream = current.stream(x.get_device())
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(n, gated_channels(oc) if gated else oc)
    height = max(1, _SCRATCH_BYTES // (2 * ic) // UNIT_OC) * UNIT_OC
    scratch = x.new_empty(min(height, oc), ic)
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
        sums = torch.mm(x, scratch[:slice_oc].T, out_dtype=torch.float32)
        dense.launch_epilogue(
            finish,
            stream,
            sums=sums.data_ptr(),
            scale=scale.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            residual=0 if residual is None else residual.data_ptr(),
            y=y.data_ptr(),
            first_oc=first_oc,
            slice_oc=slice_oc,
            oc=oc,
            n=n,
            factor=of.factor,
        )
    return y
