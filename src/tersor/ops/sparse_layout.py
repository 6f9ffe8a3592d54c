"""In which layout does a pruned weight lie, and who multiplies with it, and why? Asked by calls and by people."""

from __future__ import annotations

import torch

from tersor import hardware
from tersor.errors import UnsupportedError
from tersor.formats import Activations, Sparse
from tersor.hardware import Chip
from tersor.kernels.tune import sparse as tune
from tersor.layouts import SparseWeight, TiledSparseWeight
from tersor.layouts.packing import BYTEWISE, target_of
from tersor.layouts.sparse_packing import SparsePacking
from tersor.layouts.tiled_sparse import tiles_reason, values_of
from tersor.ops import dispatch, mode
from tersor.ops.dispatch import Reason


def reason(
    sparse: Sparse,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    activations: Activations = Activations.NATIVE,
) -> str:
    """Return why no kernel reads a pruned weight in kernel tiles, or an empty string where one does.

    Args:
        sparse, shape: representation and (OC, IC) of the weight.
        dtype, device: of activations as they come.
        activations: what they are multiplied as.
    """
    why = dispatch.environment_reason(dtype, device)
    return why or chip_reason(sparse, shape, dtype, _chip(device), activations)


def chip_reason(
    sparse: Sparse,
    shape: tuple[int, int],
    dtype: torch.dtype,
    chip: Chip,
    activations: Activations = Activations.NATIVE,
) -> str:
    """Return the same for a GPU that has kernels, in whatever mode."""
    target = target_of(activations, dtype)
    if target is None:
        return f"kernels take float16 and bfloat16 activations, not {dtype}"
    if chip.capability != (9, 0):
        return "kernel tiles of pruned weights need compute capability 9.0, this is {}.{}".format(*chip.capability)
    if not shape[0] * shape[1]:
        return "there is nothing to compute"
    return tiles_reason(sparse, target)


def check_activations(sparse: Sparse, activations: Activations | str) -> Activations:
    """Return what a pruned weight is to be multiplied with.

    Raises:
        InputError: no such activations.
        UnsupportedError: no kernel multiplies such values with them.
    """
    chosen = Activations.of(activations)
    if chosen is Activations.NATIVE:
        return chosen
    why = f"{chosen.value} activations have no kernel"
    if chosen is Activations.E4M3:
        why = tiles_reason(sparse, BYTEWISE[chosen])
    if why:
        raise UnsupportedError(f"pruned weights in {sparse.values} are multiplied with 16-bit activations alone: {why}")
    return chosen


def cut_of(sparse: Sparse, shape: tuple[int, int], dtype: torch.dtype, chip: Chip) -> tuple[int, int]:
    """Return places and bytes by which a weight is cut (`Cuts.of`), where `chip_reason` has nothing against tiles."""
    bits = SparsePacking.of(values_of(sparse), _target(dtype)).bits
    return tune.places(*shape, bits, chip), tune.least_bytes(bits, chip)


def preferred(
    weight: SparseWeight | TiledSparseWeight,
    dtype: torch.dtype,
    activations: Activations | str = Activations.NATIVE,
) -> SparseWeight | TiledSparseWeight:
    """Return a weight in the layout in which it is multiplied with activations of a dtype on its device.

    It is the same object where it lies so already.

    Args:
        weight: as it lies.
        dtype: of activations as they come.
        activations: what they are multiplied as: as they come, or in e4m3, which a weight in tiles says on any device.

    Raises:
        UnsupportedError: no kernel multiplies such values with them, on whatever GPU.
        FormatError: the weight has numbers of which e4m3 has no common multiple.
    """
    device, stored, chosen = weight.device, weight, check_activations(weight.sparse, activations)
    why = reason(weight.sparse, weight.shape, dtype, device, chosen)
    bytewise = chosen is not Activations.NATIVE
    target = BYTEWISE[chosen] if bytewise else target_of(chosen, dtype)
    if isinstance(weight, TiledSparseWeight):
        if weight.packing.target == target and (bytewise or not why):
            return weight
        stored = weight.stored()
    assert isinstance(stored, SparseWeight)
    if target is None or (why and not bytewise):
        return stored
    cut = (0, 0) if why else cut_of(stored.sparse, stored.shape, dtype, _chip(device))
    return TiledSparseWeight.of(stored, target, *cut)


def problem_of(
    packing: SparsePacking, shape: tuple[int, int], n: int, places: int, nbytes: int, batch_invariant: bool = False
) -> tune.SparseProblem:
    """Return the problem that n tokens make with a weight of so many places and bytes."""
    return tune.SparseProblem(
        oc=shape[0], ic=shape[1], n=n, bits=packing.bits, instructions=packing.instructions, places=places,
        nbytes=nbytes, bytewise=packing.bytewise, batch_invariant=batch_invariant,
    )  # fmt: skip


def decide(problem: tune.SparseProblem, chip: Chip) -> tuple[Reason, tune.SparseConfig | None]:
    """Decide who multiplies with kernel tiles: the fused kernel, and how it runs, or cuBLAS behind one that decodes."""
    config = tune.choose(problem, chip)
    if tune.fused(problem, chip):
        return Reason(dispatch.FUSED, str(config)), config
    fused, other = (
        f"{1e6 * time:.0f}" for time in (tune.seconds(problem, config, chip), tune.decompress_seconds(problem, chip))
    )
    why = f"{problem.n} tokens are predicted to take {other} us so, {fused} us in the fused kernel"
    return Reason(dispatch.DECOMPRESS, why), None


def explain(
    sparse: Sparse,
    shape: tuple[int, int],
    density: float,
    n: int,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cuda",
    activations: Activations | str = Activations.NATIVE,
) -> Reason:
    """Say who would multiply n tokens with a pruned weight of which such a part is left, and why."""
    chosen = check_activations(sparse, activations)
    where = torch.device(device)
    if where.type == "cuda" and not hardware.cuda_available():
        return Reason(dispatch.REFERENCE, "torch sees no CUDA device")
    why, target = reason(sparse, shape, dtype, where, chosen), target_of(chosen, dtype)
    if why or target is None:
        return stored_reason(sparse, shape, dtype, where)
    packing, chip = SparsePacking.of(values_of(sparse), target), _chip(where)
    places, _ = cut_of(sparse, shape, dtype, chip)
    nbytes = round(shape[0] * shape[1] * tune.stored_bits(density, packing.bits, shape[0], places) / 8)
    problem = problem_of(packing, shape, n, places, nbytes, mode.current().batch_invariant)
    return decide(problem, chip)[0]


def stored_reason(sparse: Sparse, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Reason:
    """Say who multiplies with a weight as it is stored, and why."""
    why = dispatch.environment_reason(dtype, device)
    if why:
        return Reason(dispatch.REFERENCE, why)
    why = reason(sparse, shape, dtype, device) or "the weight is not in kernel tiles"
    return Reason(dispatch.DECOMPRESS, f"slices of rows are decoded: {why}")


def _target(dtype: torch.dtype) -> str:
    target = target_of(Activations.NATIVE, dtype)
    assert target is not None
    return target


def _chip(device: torch.device) -> Chip:
    return hardware.of_device(torch.cuda.current_device() if device.index is None else device.index)
