"""Products with a pruned weight that no fused kernel is to make: slices of it are decoded, which cuBLAS multiplies.

As in `dequantized`; the weight lies in kernel tiles, or as it is stored. `linear` serves a weight with outliers, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tersor import hardware
from tersor.formats import Sparse
from tersor.kernels import dense, jit
from tersor.kernels import sparse as kernels
from tersor.kernels.tune import SCRATCH_BYTES, splits_sums
from tersor.kernels.tune import sparse as tune
from tersor.layouts.blocks import UNIT_OC
from tersor.layouts.sparse_packing import SparsePacking
from tersor.layouts.sparse_tiles import places_of
from tersor.ops import current, dequantized

_ALIGNED = 8
"""Channels of 16 bytes: of rows that do not begin with them, cuBLAS splits sums all the same, and rounds the parts."""


def linear(
    x: torch.Tensor,
    slices: Iterator[tuple[int, torch.Tensor]],
    bias: torch.Tensor | None,
    oc: int,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    """Return the result [N, outputs] of x [N, IC] with slices of a decoded weight that has its scales.

    cuBLAS rounds where it has nothing to add but a bias of all rows, as many tiles as there are multiprocessors, in the
    last slice too, and rows of whole 16 bytes; else its float32 sums are rounded by a kernel of their own. For it adds
    a matrix, which a residual is and a bias of a slice becomes, to products that it has rounded already.

    Args:
        x, bias, residual: as kernels read them.
        slices: first row and decoded rows of each.
        oc, gate: rows of the weight, and how gate and up become one, or 0.
    """
    chip = hardware.of_device(x.get_device())
    first = next(slices)
    height = first[1].shape[0]
    alone = not gate and residual is None and (bias is None or height == oc)
    if not alone or x.shape[1] % _ALIGNED or splits_sums(oc % height or height, x.shape[0], chip):
        target = str(x.dtype).removeprefix("torch.")
        finish = jit.get(dense.finish_source(target, 0, gate), x.device)
        every = _chained(first, slices)
        return dequantized.finished(x, every, finish, 0, bias, oc, residual, gate, 1.0)
    y = x.new_empty(x.shape[0], oc)
    for at, decoded in _chained(first, slices):
        last = at + decoded.shape[0]
        if bias is None:
            torch.mm(x, decoded.T, out=y[:, at:last])
        else:
            torch.addmm(bias, x, decoded.T, out=y)
    return y


def _chained(
    first: tuple[int, torch.Tensor], others: Iterator[tuple[int, torch.Tensor]]
) -> Iterator[tuple[int, torch.Tensor]]:
    yield first
    yield from others


def slices(
    mask: torch.Tensor,
    layers: torch.Tensor,
    scale: torch.Tensor,
    starts: torch.Tensor,
    marks: torch.Tensor,
    packing: SparsePacking,
    shape: tuple[int, int],
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row and the decoded rows, [rows, IC], of each slice; a slice overwrites the last one."""
    (oc, ic), index, places = shape, mask.get_device(), places_of(starts, marks)
    chip = hardware.of_device(index)
    tile, height = tune.decompress_tile(chip), tune.slice_rows(oc, ic, places, chip)
    function = jit.get(kernels.decompress_source(packing, tile), index)
    scratch = torch.empty(min(height, oc), ic, dtype=getattr(torch, packing.target), device=mask.device)
    for first in range(0, oc, height):
        rows, unit = min(height, oc - first), first // UNIT_OC
        kernels.launch_decompress(
            function,
            current.stream(index),
            tune.config(tile, rows, places, chip),
            mask=mask[unit].data_ptr(),
            layers=layers.data_ptr(),
            starts=starts.data_ptr(),
            marks=marks[unit].data_ptr(),
            scale=scale[first:].data_ptr(),
            dense=scratch.data_ptr(),
            first_row=first,
            rows=rows,
            ic=ic,
            places=places,
            factor=packing.factor,
        )
        yield first, scratch[:rows]


def stored_slices(
    sparse: Sparse,
    ic: int,
    mask: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    starts: torch.Tensor,
    dtype: torch.dtype,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the same of a weight as it is stored, in a 16-bit dtype; tensors are those of a `SparseWeight`."""
    oc, index = mask.shape[0], mask.get_device()
    function = jit.get(kernels.stored_source(sparse, str(dtype).removeprefix("torch.")), index)
    height = min(oc, max(1, SCRATCH_BYTES // (2 * ic * UNIT_OC)) * UNIT_OC)
    scratch = torch.empty(height, ic, dtype=dtype, device=mask.device)
    for first in range(0, oc, height):
        rows = min(height, oc - first)
        kernels.launch_stored(
            function,
            current.stream(index),
            mask=mask.data_ptr(),
            values=values.data_ptr(),
            starts=starts.data_ptr(),
            scale=0 if scale is None else scale.data_ptr(),
            zero_point=0 if zero_point is None else zero_point.data_ptr(),
            dense=scratch.data_ptr(),
            first_row=first,
            rows=rows,
            ic=ic,
            groups=1 if scale is None else scale.shape[1],
            words=values.numel(),
        )
        yield first, scratch[:rows]
