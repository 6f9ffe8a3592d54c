"""What is left of a pruned weight? Counted where it is stored sparse, asked for where a conversion may store it so."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch

from tersor.checkpoint.config import QuantizationConfig, Represented
from tersor.checkpoint.modules import LinearLayer
from tersor.checkpoint.names import MASK, VALUES
from tersor.checkpoint.source import StoredTensor
from tersor.errors import CheckpointError, InputError
from tersor.formats import Pruned, Scheme, Sparse
from tersor.layouts import bitmap

_MASK_BYTES = 1 << 22
"""Bytes of a mask that are counted at once."""

NOT_PRUNED = "not pruned so far that it would be smaller"
"""Why a weight is copied that would keep its numbers."""
NEVER_SPARSE = "not stored sparse"
"""Why an expert, or an embedding, is."""

FindPruned: TypeAlias = Callable[[StoredTensor, LinearLayer, Sparse], Pruned | None]
"""Returns what is left of a layer's weight where storing that takes fewer bytes, else `None`."""


def read_pruned(tensors: Mapping[str, StoredTensor], stem: str, sparse: Sparse) -> Pruned:
    """Return how many weights are left in every row of a pruned weight: its mask is read for that.

    Raises:
        CheckpointError: no mask of bytes, or values of another number of weights beside it.
    """
    stored = tensors[f"{stem}.{MASK}"]
    spec, values = stored.spec, tensors.get(f"{stem}.{VALUES}")
    if spec.dtype != "U8" or len(spec.shape) != 2:
        raise CheckpointError(
            f"{stored.file.path}: {spec.name} is {spec.dtype} {list(spec.shape)}, expected U8 [output features, bytes]"
        )
    if values is None:
        raise CheckpointError(f"tensor {stem}.{VALUES} is missing beside the others of {stem}")
    oc, width = spec.shape
    step = max(1, _MASK_BYTES // max(1, width))
    counts = torch.zeros(oc, dtype=torch.int32, device="cpu")
    for first in range(0, oc, step):
        last = min(first + step, oc)
        rows = torch.empty(last - first, width, dtype=torch.uint8, device="cpu")
        stored.file.read_into(spec, first * width, rows.numpy().data.cast("B"))
        counts[first:last] = bitmap.count(rows)
    found = Pruned.of(sparse, counts)
    if values.spec.shape != (found.words,):
        raise CheckpointError(
            f"{values.file.path}: {values.spec.name} is {list(values.spec.shape)}, and the {found.nonzeros} weights "
            f"that the mask beside it leaves take [{found.words}] in {sparse.key()}"
        )
    return found


def left_of(
    tensor: StoredTensor, layer: LinearLayer, sparse: Sparse, find_pruned: FindPruned | None
) -> Pruned | Scheme | None:
    """Return what is left of a weight where that is smaller, else the scheme of its values, `None` for plain numbers.

    Experts and embeddings are never stored sparse.

    Raises:
        InputError: nobody looks for pruned weights.
    """
    if never_sparse(layer):
        return sparse.scheme
    if find_pruned is None:
        raise InputError(
            f"{sparse.values.name} is what pruned weights keep, which are looked for in checkpoints on disk"
        )
    found = find_pruned(tensor, layer, sparse)
    return sparse.scheme if found is None else found


def never_sparse(layer: LinearLayer) -> bool:
    """Tell whether a layer is an expert, or all those of a layer, or an embedding."""
    return layer.stacked or layer.embedding or re.search(r"\.experts\.\d+\.", layer.module) is not None


def check_keeps(layer: LinearLayer, scheme: Scheme, export: str) -> None:
    """Hold that a layer's weight may keep the outliers that its scheme has, if any, in a checkpoint format.

    Raises:
        InputError: the export cannot say them, or they are of experts or an embedding.
        FormatError: rows are longer than columns are counted.
    """
    if scheme.outliers is None:
        return
    if export != "tersor":
        raise InputError(f"{export} cannot say outliers beside codes: leave them out")
    if never_sparse(layer):
        raise InputError(
            f"{layer.module}: experts and embeddings keep no outliers: give them an override, which has none, or "
            "ignore them"
        )
    scheme.outliers.per_row(layer.shape[-1])


def narrowed(config: QuantizationConfig, used: Collection[Represented | None]) -> QuantizationConfig:
    """Return a configuration in which what may be sparse and never is has the scheme that it has everywhere.

    Args:
        config: with what was asked for.
        used: what the weights are represented in that are stored sparse.
    """

    def narrow(one: Sparse | Scheme) -> Sparse | Scheme:
        return one if isinstance(one, Scheme) or one in used else one.scheme or one

    scheme = narrow(config.scheme) if isinstance(config.scheme, Sparse) else config.scheme
    overrides = [replace(override, scheme=narrow(override.scheme)) for override in config.overrides]
    return replace(config, scheme=scheme, overrides=tuple(overrides))
