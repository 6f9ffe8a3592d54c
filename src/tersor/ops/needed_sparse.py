"""Which kernels can products with a pruned weight ask for? Told ahead of the first, as `needed` does."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tersor.formats import Activations, Sparse
from tersor.hardware import Chip
from tersor.kernels import dense, quantizing, sparse
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
    weight: SparseWeight | TiledSparseWeight,
    dtype: torch.dtype,
    gate: int,
    tokens: int,
    chip: Chip,
    activations: Activations = Activations.NATIVE,
) -> Iterator[KernelSource]:
    """Yield the kernels of `ops.linear`, or of `ops.gated_linear`, with up to `tokens` tokens.

    Args:
        weight: as it lies on the GPU, or as it is stored, where none of its numbers is there.
        dtype: of activations.
        gate: how gate and up become one, or 0.
        tokens: at least 1.
        chip: the GPU.
        activations: what they will be multiplied as, of a weight as it is stored.
    """
    if isinstance(weight, TiledSparseWeight):
        way = Activations.E4M3 if weight.packing.bytewise else Activations.NATIVE
        if not weight.tiles.mask.numel():  # it is described alone
            yield from of_shape(weight.sparse, weight.shape, dtype, gate, tokens, chip, way)
            return
        if (
            not sparse_layout.chip_reason(weight.sparse, weight.shape, dtype, chip, way)
            and not mode.current().reference
        ):
            nbytes, places = weight.tiles.mask.nbytes + weight.tiles.layers.nbytes, weight.tiles.places
            yield from _of_packing(weight.packing, weight.shape, dtype, places, nbytes, gate, tokens, chip)
        return
    yield from of_shape(weight.sparse, weight.shape, dtype, gate, tokens, chip, activations)


def of_shape(
    representation: Sparse,
    shape: tuple[int, int],
    dtype: torch.dtype,
    gate: int,
    tokens: int,
    chip: Chip,
    activations: Activations = Activations.NATIVE,
) -> Iterator[KernelSource]:
    """Yield the same for weights of a representation and a shape, (OC, IC), whichever codes they have."""
    native, target = target_of(Activations.NATIVE, dtype), target_of(activations, dtype)
    if native is None or target is None or mode.current().reference or not shape[0] * shape[1]:
        return
    if sparse_layout.chip_reason(representation, shape, dtype, chip, activations):
        if activations is Activations.NATIVE:
            yield sparse.stored_source(representation, target)
            yield dense.finish_source(target, 0, gate)
        return
    places, _ = sparse_layout.cut_of(representation, shape, dtype, chip)
    for packing in SparsePacking.choices(values_of(representation), target):
        nbytes = round(shape[0] * shape[1] * tune.stored_bits(_USUAL_DENSITY, packing.bits, shape[0], places) / 8)
        yield from _of_packing(packing, shape, dtype, places, nbytes, gate, tokens, chip)


def _of_packing(
    packing: SparsePacking,
    shape: tuple[int, int],
    dtype: torch.dtype,
    places: int,
    nbytes: int,
    gate: int,
    tokens: int,
    chip: Chip,
) -> Iterator[KernelSource]:
    result = str(dtype).removeprefix("torch.") if packing.bytewise else ""
    if packing.bytewise:
        yield quantizing.quantize_source(result, Activations.E4M3)
    invariant = mode.current().batch_invariant
    problem = sparse_layout.problem_of(packing, shape, tokens, places, nbytes, invariant)
    for tile in sorted(tune.asked(problem, chip), key=str):
        yield sparse.sparse_source(packing, tile, gate, result)
    if not all(tune.fused(one, chip) for one in tune.smaller(problem)):
        yield sparse.decompress_source(packing, tune.decompress_tile(chip))
        yield dense.finish_source(packing.target, 0, gate)
