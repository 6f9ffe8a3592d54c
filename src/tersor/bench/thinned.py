"""A weight to be timed of which a part is pruned at random, written as its values with its percents: `fp6_e3m2:s50`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tersor import ops
from tersor.bench import timing
from tersor.compress import quantize_rtn
from tersor.formats import Activations, Plain, Scheme, Sparse
from tersor.kernels.tune import sparse as tune
from tersor.layouts import SparseWeight, TiledSparseWeight
from tersor.layouts.sparse_packing import SparsePacking
from tersor.layouts.tiled_sparse import values_of


@dataclass(frozen=True, slots=True)
class Thinned:
    """Values, and which part of the weights is pruned.

    Attributes:
        values: of the weights left.
        sparsity: the part that is pruned, from 0 to 1.
    """

    values: Scheme | Plain
    sparsity: float

    @property
    def ending(self) -> str:
        """What the name of the values gets behind it: `:s50`."""
        return f":s{100 * self.sparsity:g}"

    @property
    def sparse(self) -> Sparse:
        """The representation."""
        return Sparse(self.values)

    def groups(self, ic: int) -> None:
        """Hold that groups divide so many input channels.

        Raises:
            FormatError: they do not.
        """
        if isinstance(self.values, Scheme):
            self.values.groups(ic)

    def packed_bytes(self, oc: int, ic: int) -> int:
        """Return about the bytes of such a weight in kernel tiles, with its scales; `packed` makes the true ones."""
        bits = 8 if isinstance(self.values, Scheme) else self.values.bits
        return round(oc * ic * tune.stored_bits(1 - self.sparsity, bits, oc, 0) / 8) + 4 * oc

    def packing(self, target: str) -> SparsePacking:
        """Return the packing of any values for activations of a dtype."""
        return SparsePacking.of(values_of(self.sparse), target)

    def weight(
        self, oc: int, ic: int, dtype: torch.dtype, activations: Activations = Activations.NATIVE
    ) -> SparseWeight | TiledSparseWeight:
        """Return a random weight [oc, ic] on the current GPU, in the layout that serves activations of a dtype."""
        plain = torch.randn(oc, ic, dtype=dtype, device="cuda") * ic**-0.5
        kept = torch.rand(oc, ic, device="cuda") >= self.sparsity
        if isinstance(self.values, Scheme):
            made = SparseWeight.from_encoded(quantize_rtn(plain, self.values), kept)
        else:
            made = SparseWeight.from_plain(plain, kept)
        return ops.preferred_sparse(made, dtype, activations)

    def packed(
        self, oc: int, ic: int, dtype: torch.dtype, activations: Activations = Activations.NATIVE
    ) -> list[SparseWeight | TiledSparseWeight]:
        """Return copies of a random weight."""
        first = self.weight(oc, ic, dtype, activations)
        return [first, *(_copied(first) for _ in range(timing.copies(first.nbytes) - 1))]


def _copied(weight: SparseWeight | TiledSparseWeight) -> SparseWeight | TiledSparseWeight:
    if isinstance(weight, SparseWeight):
        return replace(weight, mask=weight.mask.clone(), values=weight.values.clone())
    held = weight.tiles
    tiles = replace(held, mask=held.mask.clone(), layers=held.layers.clone(), marks=held.marks.clone())
    return replace(weight, tiles=tiles, scale=weight.scale.clone())
