"""Which kernels can products with a pruned weight ask for? Told ahead of the first, as `needed` does."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tersor.formats import Activations, Sparse
from tersor.hardware import Chip
from tersor.kernels import dense, sparse
from tersor.kernels.jit import KernelSource
from tersor.kernels.tune import sparse as tune
from tersor.layouts import SparseWeight, TiledSparseWeight
from tersor.layouts.packing import target_of
from tersor.layouts.sparse_packing import SparsePacking
from tersor.layouts.tiled_sparse import values_of
from tersor.ops import mode, sparse_layout

_USUAL_DENSITY = 0.5
"""What is taken for left of a weight of which no number is known."""


def linear(
    weight: SparseWeight | TiledSparseWeight, dtype: torch.dtype, gate: int, tokens: int, chip: Chip
) -> Iterator[KernelSource]:
    """Yield the kernels of `ops.linear`, or of `ops.gated_linear`, with up to `tokens` tokens.

    Args:
        weight: as it lies on the GPU, or as it is stored, where none of its numbers is there.
        dtype: of activations.
        gate: how gate and up become one, or 0.
        tokens: at least 1.
        chip: the GPU.
    """
    if isinstance(weight, TiledSparseWeight):
        if not sparse_layout.chip_reason(weight.sparse, weight.shape, dtype, chip) and not mode.current().reference:
            nbytes = weight.tiles.mask.nbytes + weight.tiles.layers.nbytes
            yield from _of_packing(weight.packing, weight.shape, weight.tiles.places, nbytes, gate, tokens, chip)
        return
    yield from of_shape(weight.sparse, weight.shape, dtype, gate, tokens, chip)


def of_shape(
    representation: Sparse, shape: tuple[int, int], dtype: torch.dtype, gate: int, tokens: int, chip: Chip
) -> Iterator[KernelSource]:
    """Yield the same for weights of a representation and a shape, (OC, IC), whichever codes they have."""
    target = target_of(Activations.NATIVE, dtype)
    if target is None or mode.current().reference or not shape[0] * shape[1]:
        return
    if sparse_layout.chip_reason(representation, shape, dtype, chip):
        yield sparse.stored_source(representation, target)
        yield dense.finish_source(target, 0, gate)
        return
    places, _ = sparse_layout.cut_of(representation, shape, dtype, chip)
    for packing in SparsePacking.choices(values_of(representation), target):
        nbytes = round(shape[0] * shape[1] * tune.stored_bits(_USUAL_DENSITY, packing.bits, shape[0], places) / 8)
        yield from _of_packing(packing, shape, places, nbytes, gate, tokens, chip)


def _of_packing(
    packing: SparsePacking, shape: tuple[int, int], places: int, nbytes: int, gate: int, tokens: int, chip: Chip
) -> Iterator[KernelSource]:
    invariant = mode.current().batch_invariant
    problem = sparse_layout.problem_of(packing, shape, tokens, places, nbytes, invariant)
    for tile in sorted(tune.asked(problem, chip), key=str):
        yield sparse.sparse_source(packing, tile, gate)
    if not all(tune.fused(one, chip) for one in tune.smaller(problem)):
        yield sparse.decompress_source(packing, tune.decompress_tile(chip))
        yield dense.finish_source(packing.target, 0, gate)
