"""Which weights of a checkpoint are pruned so far that a mask and what is left of them take fewer bytes?

What is zero was pruned, whoever did it; -0.0 is zero. A few rows, spread over a weight, tell whether all are counted:
where they have next to no zeros, a weight that is pruned alike in its rows is no smaller sparse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from tersor.checkpoint.config import Alike, Override
from tersor.checkpoint.modules import LinearLayer
from tersor.checkpoint.names import TORCH_DTYPES, stored_tensors
from tersor.checkpoint.released import DecodedTensor
from tersor.checkpoint.source import StoredTensor
from tersor.errors import InputError
from tersor.formats import Pruned, Sparse

SAMPLED_ROWS = 64
"""Rows, spread evenly, that tell whether a weight is pruned at all."""
FEWEST_ZEROS = 0.01
"""The share of zeros in these rows from which on a weight is counted. A mask takes a bit, so that a 32nd of the weights
has to be zero before anything is smaller."""
_BLOCK_BYTES = 1 << 24


def check_sparse(
    sparse: str, asked: Alike, overrides: Iterable[Override], obstacle: str, options: Iterable[object]
) -> bool:
    """Tell whether pruned weights are looked for.

    Args:
        sparse: what the user said, `auto` or `off`.
        asked, overrides: the formats that the user asked for.
        obstacle: why none can be stored, else an empty string.
        options: what else was said of the format: group size and scale dtype.

    Raises:
        InputError: neither of the two, or numbers of pruned weights are asked for and not looked for.
    """
    if sparse not in ("auto", "off"):
        raise InputError(f"sparse is {sparse!r}: use auto or off")
    wanted = next((one for one in (asked, *(each.scheme for each in overrides)) if isinstance(one, Sparse)), None)
    why = "sparse is off" if sparse == "off" else obstacle
    if wanted is not None and why:
        raise InputError(f"{wanted.values.name} only repacks weights that are pruned, and {why}: ask for a format")
    if isinstance(asked, Sparse) and any(option is not None for option in options):
        raise InputError(f"{asked.values.name} numbers have no scales: leave group size and scale dtype out")
    return not why


def may_be_sparse(asked: Alike) -> Sparse:
    """Return what weights are represented in that have the values asked for, and may be stored sparse."""
    return asked if isinstance(asked, Sparse) else Sparse(asked)


class Survey:
    """Counts what is left of weights; each weight is read once, however often it is asked about."""

    def __init__(self) -> None:
        self._counts: dict[str, torch.Tensor | None] = {}

    def find(self, tensor: StoredTensor, layer: LinearLayer, sparse: Sparse) -> Pruned | None:
        """Return what is left of a layer's weight where storing that takes fewer bytes than a dense weight.

        Args:
            tensor: the weight; one that is stored compressed is not looked at.
            layer: whose weight it is.
            sparse: the representation that is asked for; its values are those of the dense weight.

        Raises:
            CheckpointError: the disk does not give the weight.
        """
        name = tensor.spec.name
        if name not in self._counts:
            self._counts[name] = _counts(tensor, layer)
        counts = self._counts[name]
        if counts is None:
            return None
        found, (oc, ic) = Pruned.of(sparse, counts), layer.shape
        return found if found.nbytes(ic) < dense_bytes(sparse, oc, ic) else None


def dense_bytes(sparse: Sparse, oc: int, ic: int) -> int:
    """Return the bytes of a dense weight [oc, ic] with the values of a sparse one."""
    if sparse.scheme is None:
        return oc * ic * sparse.value_bits // 8
    forms = stored_tensors(sparse.scheme, oc, ic).values()
    return sum(math.prod(form.shape) * form.dtype.itemsize for form in forms)


def _counts(tensor: StoredTensor, layer: LinearLayer) -> torch.Tensor | None:
    """Return the weights left in every row, int32 [OC], or `None` where the weight is not pruned."""
    if isinstance(tensor, DecodedTensor) or tensor.spec.dtype not in TORCH_DTYPES or not all(layer.shape):
        return None
    rows, columns = tensor.spec.shape
    step = max(1, rows // SAMPLED_ROWS)
    sampled = [_left(tensor, row, row + 1) for row in range(0, rows, step)]
    zeros = 1 - float(torch.cat(sampled).sum()) / (len(sampled) * columns)
    if zeros < FEWEST_ZEROS:
        return None
    height = max(1, _BLOCK_BYTES // max(1, tensor.spec.nbytes // rows))
    blocks = [_left(tensor, first, min(first + height, rows)) for first in range(0, rows, height)]
    if layer.transposed:  # rows on disk are input channels
        return torch.stack([block.sum(0) for block in blocks]).sum(0).to(torch.int32)
    return torch.cat([block.sum(1) for block in blocks]).to(torch.int32)


def _left(tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
    """Return which weights of some rows on disk are not zero, bool [rows, columns]."""
    spec = tensor.spec
    row_bytes = spec.nbytes // spec.shape[0]
    flat = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
    tensor.file.read_into(spec, first * row_bytes, flat.numpy().data)
    return flat.view(TORCH_DTYPES[spec.dtype]).view(last - first, spec.shape[1]) != 0
