"""What multiplies in a layer of vLLM? Modules whose tensors are buffers, and whose forward is one operator each.

Everything that a trace has to follow is a constant beside them, so torch.compile sees an operator of torch with a meta
twin, and a CUDA graph its launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tersor import ops
from tersor.errors import UnsupportedError
from tersor.formats import Activations, Scheme
from tersor.layouts import MixedWeight, PackedWeight, SparseWeight, TiledSparseWeight
from tersor.models.weights import Matrix
from tersor.ops import outliers, row_sets


class Part(nn.Module):
    """y[..., OC] = x[..., IC] @ W[OC, IC]^T + bias.

    Attributes:
        rows: OC.
    """

    def __init__(self, rows: int, tensors: Sequence[torch.Tensor | None]) -> None:
        """Hold the tensors of a weight."""
        super().__init__()
        self.rows = rows
        self._names = [f"held_{place}" for place in range(len(tensors))]
        for name, tensor in zip(self._names, tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def held(self) -> list[Any]:
        """The tensors in their order, `None` for one that the weight has not."""
        return [getattr(self, name) for name in self._names]


class PlainPart(Part):
    """A plain weight, beside packed ones in one layer."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(len(weight), [weight])

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply."""
        weight: torch.Tensor = self.held[0]
        return functional.linear(x, weight, bias)


class DensePart(Part):
    """A weight in one scheme."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__(weight.shape[0], [weight.data, weight.scale, weight.zero_point])
        self.of = (weight.scheme.key(), *weight.shape, weight.layout)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply."""
        return torch.ops.tersor.linear(x, self.held_0, self.held_1, self.held_2, bias, *self.of)


class OutlierPart(Part):
    """A weight in one scheme that keeps outliers."""

    def __init__(self, weight: PackedWeight) -> None:
        held = [weight.data, weight.scale, weight.zero_point, weight.outliers, weight.arranged]
        super().__init__(weight.shape[0], held)
        self.of = (weight.scheme.key(), *weight.shape, weight.layout)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply."""
        return outliers.operator(x, *self.held, bias, *self.of)


class MixedPart(Part):
    """A weight whose output features have different schemes."""

    def __init__(self, weight: MixedWeight) -> None:
        tensors, form = row_sets.tensors_of(weight)
        super().__init__(weight.shape[0], tensors)
        self.form = form

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply."""
        return torch.ops.tersor.mixed_linear(x, self.held, self.form, bias)


class SparsePart(Part):
    """A pruned weight as it is stored."""

    def __init__(self, weight: SparseWeight) -> None:
        held = [weight.mask, weight.values, weight.scale, weight.zero_point, weight.starts]
        super().__init__(weight.shape[0], held)
        self.of = (weight.form.key(), weight.shape[1])

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply."""
        return torch.ops.tersor.sparse_linear(x, *self.held, bias, *self.of)


class TiledSparsePart(Part):
    """A pruned weight in kernel tiles."""

    def __init__(self, weight: TiledSparseWeight) -> None:
        tiles = weight.tiles
        super().__init__(weight.shape[0], [tiles.mask, tiles.layers, weight.scale, tiles.starts, tiles.marks])
        self.of = (weight.key, *weight.shape)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply."""
        return torch.ops.tersor.tiled_sparse_linear(x, *self.held, bias, *self.of)


class Parts(nn.ModuleList):
    """Weights of one layer that read the same activations: outputs stand one behind the other."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return [..., sum of OC] of x [..., IC]."""
        if len(self) == 1:
            return self[0](x, bias)
        biases = [None] * len(self) if bias is None else bias.split([part.rows for part in self])
        return torch.cat([part(x, own) for part, own in zip(self, biases, strict=True)], dim=-1)


def parts_of(weights: Sequence[Matrix], dtype: torch.dtype, activations: Activations) -> Parts:
    """Return what multiplies with weights, each in the layout of its kernel.

    Args:
        weights: on their device, packed ones in the stored stream.
        dtype: of activations.
        activations: what packed weights are multiplied with.

    Raises:
        UnsupportedError: weights of a scheme cannot be multiplied with such activations.
    """
    return Parts([_part_of(weight, dtype, activations) for weight in weights])


def embedding_rows(ids: torch.Tensor, part: Part, dtype: torch.dtype) -> torch.Tensor:
    """Return rows [..., IC] of a dense part in the stored stream, decoded."""
    assert isinstance(part, DensePart)
    scheme, oc, ic, _ = part.of
    return torch.ops.tersor.embedding(ids, *part.held, scheme, oc, ic, dtype)


def stored_of(part: Part) -> PackedWeight:
    """Return the weight of a dense part, in the layout that it has."""
    assert isinstance(part, DensePart)
    scheme, oc, ic, layout = part.of
    data, scale, zero_point = part.held
    assert data is not None and scale is not None
    return PackedWeight(Scheme.from_key(scheme), (oc, ic), data, scale, zero_point, layout)


def _part_of(weight: Matrix, dtype: torch.dtype, activations: Activations) -> Part:
    if isinstance(weight, PackedWeight):
        layout = ops.preferred_layout(weight.scheme, dtype, weight.data.device, activations)
        return (DensePart if weight.outliers is None else OutlierPart)(weight.to_layout(layout))
    if isinstance(weight, MixedWeight):
        device = weight.device
        return MixedPart(weight.to_layout(lambda scheme: ops.preferred_layout(scheme, dtype, device, activations)))
    if isinstance(weight, SparseWeight):
        if activations is not Activations.NATIVE:
            raise UnsupportedError("in vLLM pruned weights are multiplied with 16-bit activations alone")
        ready = ops.preferred_sparse(weight, dtype)
        return SparsePart(ready) if isinstance(ready, SparseWeight) else TiledSparsePart(ready)
    assert isinstance(weight, torch.Tensor)
    return PlainPart(weight)
