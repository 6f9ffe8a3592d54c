"""Which scale does a weight have where? Told by the shape of the scales: one for a tensor, row, group or block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tersor.checkpoint.released.parts import read_float
from tersor.checkpoint.source import StoredTensor
from tersor.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales of a matrix [OC, IC], or of the matrices of a tensor [E, OC, IC].

    Attributes:
        tensor: the stored scales.
        shape: their shape seen as [E or 1, rows, columns].
        block: rows and columns of the matrix that share a scale; the last block of either may be smaller.
        matrix: (OC, IC).
    """

    tensor: StoredTensor
    shape: tuple[int, int, int]
    block: tuple[int, int]
    matrix: tuple[int, int]

    def rows(self, expert: int, first: int, last: int) -> torch.Tensor:
        """Return the scales of rows `first` to `last` of a matrix: float32 [1 or rows, 1 or IC], to multiply with."""
        return self.companion(self.tensor, expert, first, last)

    def companion(self, tensor: StoredTensor, expert: int, first: int, last: int) -> torch.Tensor:
        """Return the same of another tensor that has the shape of the scales, such as zero points."""
        height, width = self.block
        start, stop = first // height, -(-last // height)
        experts, rows, columns = self.shape
        if experts > 1:
            grid = read_float(tensor, (expert, expert + 1)).reshape(rows, columns)[start:stop]
        elif len(tensor.spec.shape) == 2 and tensor.spec.shape[0] == rows:
            grid = read_float(tensor, (start, stop))
        else:
            grid = read_float(tensor).reshape(rows, columns)[start:stop]
        if height > 1 and rows > 1:
            grid = grid.repeat_interleave(height, 0)[first - start * height : last - start * height]
        if width > 1 and columns > 1:
            grid = grid.repeat_interleave(width, 1)[:, : self.matrix[1]]
        return grid


def grid_of(scales: StoredTensor, weight: tuple[int, ...], blocks: Sequence[tuple[int, int]]) -> Grid:
    """Find out what each scale of a weight is for.

    Args:
        scales: the stored scales.
        weight: shape of the weight, [OC, IC] or [E, OC, IC].
        blocks: sizes of blocks that may be meant; where there are none, one that divides the weight exactly.

    Raises:
        CheckpointError: the shape of the scales is none that such a weight can have.
    """
    oc, ic = weight[-2:]
    experts = weight[0] if len(weight) == 3 else 1
    shape = scales.spec.shape
    if scales.spec.numel == 1:
        return Grid(scales, (1, 1, 1), (oc, ic), (oc, ic))
    inner: tuple[int, ...]
    if len(weight) == 3:
        if shape in ((experts,), (experts, 1), (experts, 1, 1)):
            return Grid(scales, (experts, 1, 1), (oc, ic), (oc, ic))
        if shape == (experts, oc):
            return Grid(scales, (experts, oc, 1), (1, ic), (oc, ic))
        inner = shape[1:] if len(shape) == 3 and shape[0] == experts else ()
    else:
        inner = (*shape, 1) if shape == (oc,) else shape
    if len(inner) == 2 and all(inner):
        rows, columns = inner
        choices = [*blocks, (1, ic)]
        if not blocks and oc % rows == 0 and ic % columns == 0:
            choices.append((oc // rows, ic // columns))
        for height, width in choices:
            if (-(-oc // height), -(-ic // width)) == (rows, columns):
                return Grid(scales, (experts, rows, columns), (height, width), (oc, ic))
    wanted = [(-(-oc // height), -(-ic // width)) for height, width in blocks] or [(oc, 1)]
    stated = " or ".join(str([*weight[:-2], *size]) for size in dict.fromkeys(wanted))
    raise CheckpointError(
        f"{scales.file.path}: tensor {scales.spec.name!r} has shape {list(shape)}, and scales of a weight "
        f"{list(weight)} have {stated}, or one for each row or for all"
    )


def sizes_of(value: object) -> list[tuple[int, int]]:
    """Return the size of a block that a config states as a list of two, or nothing where it states none."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(item) is int and item > 0 for item in value):
        return [(value[0], value[1])]
    return []
