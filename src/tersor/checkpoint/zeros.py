"""Which part of a weight that is stored dense is not zero? Counted in the weight itself, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tersor.checkpoint.header import WEIGHT_DTYPES
from tersor.checkpoint.names import PACKED, SCALE, ZERO_POINT
from tersor.checkpoint.source import Source
from tersor.formats import Scheme
from tersor.layouts import PackedWeight

_BLOCK_ELEMENTS = 1 << 22


def dense_left(source: Source, name: str, shape: tuple[int, ...], scheme: Scheme | None) -> float | None:
    """Return which part of a matrix stands for numbers that are not zero.

    Args:
        source: the checkpoint.
        name: of the tensor, or of what a compressed weight was called before.
        shape: of the matrix.
        scheme: that it is compressed to, `None` of a plain tensor.

    Returns:
        The part; `None` of what is no matrix, of experts in one tensor, and of codes with tables or outliers.

    Raises:
        CheckpointError: the disk does not give the weight.
    """
    stem = name.removesuffix(".weight")
    marker = name if scheme is None else f"{stem}.{PACKED}"
    if len(shape) != 2 or 0 in shape or marker not in source.tensors:
        return None
    if scheme is None and source.tensors[name].spec.dtype not in WEIGHT_DTYPES:
        return None
    if scheme is not None and (scheme.has_table or scheme.outliers is not None):
        return None
    blocks = (_rows(source, stem, marker, rows, shape[1], scheme) for rows in _spans(*shape))
    return sum(int(torch.count_nonzero(block)) for block in blocks) / (shape[0] * shape[1])


def _rows(
    source: Source, stem: str, marker: str, rows: tuple[int, int], ic: int, scheme: Scheme | None
) -> torch.Tensor:
    """Return the numbers that rows stand for."""
    data = source.tensors[marker].file.read(marker, rows)
    if scheme is None:
        return data
    names = [f"{stem}.{part}" for part in (SCALE, *[ZERO_POINT] * scheme.has_zero_point)]
    scale, *zero = (source.tensors[name].file.read(name, rows) for name in names)
    return PackedWeight(scheme, (rows[1] - rows[0], ic), data, scale, zero[0] if zero else None).dequantize()


def _spans(oc: int, ic: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_ELEMENTS // ic)
    for first in range(0, oc, step):
        yield first, min(first + step, oc)
