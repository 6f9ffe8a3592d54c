"""Many tokens beside a pruned weight in kernel tiles, where no fused kernel is to take them: slices of it are decoded.

cuBLAS multiplies them, as in `dequantized`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tersor import hardware
from tersor.kernels import dense, jit
from tersor.kernels import sparse as kernels
from tersor.kernels.tune import sparse as tune
from tersor.layouts.blocks import UNIT_OC
from tersor.layouts.sparse_packing import SparsePacking
from tersor.ops import current, dequantized

_TILE = 128
"""Rows and tokens of a tile of cuBLAS: where as many as there are multiprocessors fit, it splits no sums."""


def linear(
    x: torch.Tensor,
    slices: Iterator[tuple[int, torch.Tensor]],
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    oc: int,
    residual: torch.Tensor | None,
    gate: int,
) -> torch.Tensor:
    """Return the result [N, outputs] of x [N, IC] with slices of a decoded weight that has its scales.

    cuBLAS rounds where it has nothing to add but a bias or a residual, and as many tiles as there are multiprocessors;
    else its float32 sums are rounded by a kernel of their own.

    Args:
        x, bias, residual: as kernels read them.
        slices: first row and decoded rows of each.
        scale: of rows, on the device; not read.
        oc, gate: rows of the weight, and how gate and up become one, or 0.
    """
    n, sms = x.shape[0], hardware.of_device(x.get_device()).sms
    whole = not gate and (bias is None or residual is None)
    first = next(slices)
    if not whole or -(-n // _TILE) * -(-first[1].shape[0] // _TILE) < sms:
        target = str(x.dtype).removeprefix("torch.")
        finish = jit.get(dense.finish_source(target, 0, gate), x.device)
        every = _chained(first, slices)
        return dequantized.finished(x, every, finish, scale.data_ptr(), bias, oc, residual, gate, 1.0)
    y = x.new_empty(n, oc)
    for at, decoded in _chained(first, slices):
        last = at + decoded.shape[0]
        if residual is not None:
            torch.addmm(residual[:, at:last], x, decoded.T, out=y[:, at:last])
        elif bias is not None:
            torch.addmm(bias[at:last], x, decoded.T, out=y[:, at:last])
        else:
            torch.mm(x, decoded.T, out=y[:, at:last])
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
    (oc, ic), index, runs = shape, mask.get_device(), starts.shape[1]
    chip = hardware.of_device(index)
    tile, height = tune.decompress_tile(chip), tune.slice_rows(oc, ic, runs, chip)
    function = jit.get(kernels.decompress_source(packing, tile), index)
    scratch = torch.empty(min(height, oc), ic, dtype=getattr(torch, packing.target), device=mask.device)
    for first in range(0, oc, height):
        rows, unit = min(height, oc - first), first // UNIT_OC
        kernels.launch_decompress(
            function,
            current.stream(index),
            tune.config(tile, rows, runs, chip),
            mask=mask[unit].data_ptr(),
            layers=layers.data_ptr(),
            starts=starts[unit].data_ptr(),
            marks=marks[unit].data_ptr(),
            scale=scale[first:].data_ptr(),
            dense=scratch.data_ptr(),
            rows=rows,
            ic=ic,
            factor=packing.factor,
        )
        yield first, scratch[:rows]
