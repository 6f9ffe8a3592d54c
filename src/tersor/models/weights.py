"""What is multiplied in a decoder? Plain or packed weights, stacked into one where they read the same activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn import functional

from tersor import ops
from tersor.layouts import MixedWeight, PackedWeight, SparseWeight, Stacked, StackedMixedWeight, TiledSparseWeight
from tersor.ops import Gate, Rows
from tersor.ops.collective import ALONE, Ranks
from tersor.ops.lookup import places

Matrix: TypeAlias = torch.Tensor | PackedWeight | MixedWeight | SparseWeight | TiledSparseWeight
"""A weight [OC, IC]."""
Hidden: TypeAlias = torch.Tensor | ops.Deferred
"""Rows [T, H] for a product, or those that wait for the division of the norm ahead of it."""
Between: TypeAlias = Hidden | ops.Normed
"""Rows [T, H] between layers; the norm behind them may be done."""
Given: TypeAlias = Hidden | ops.Quantized
"""Rows [T, H] as a product takes them: those of a norm may be quantised."""
Stack: TypeAlias = torch.Tensor | Stacked
"""The weights [E, OC, IC] of all experts of a layer."""


@dataclass(frozen=True, slots=True)
class Product:
    """y = x @ W^T + bias.

    Attributes:
        weight: [OC, IC].
        bias: [OC], or `None`.
    """

    weight: Matrix
    bias: torch.Tensor | None = None

    def __call__(self, x: Given, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return x [T, IC] multiplied, and `residual` [T, OC] added, if x waits for no norm: [T, OC]."""
        if isinstance(self.weight, PackedWeight) and isinstance(x, ops.Deferred):
            return ops.linear_norm_in(x, self.weight, self.bias)
        if isinstance(self.weight, PackedWeight | MixedWeight) and isinstance(x, ops.Quantized):
            return ops.linear_quantized(x, self.weight, self.bias, residual=residual)
        assert isinstance(x, torch.Tensor), "what else a norm leaves is for dense packed and mixed weights"
        if not isinstance(self.weight, torch.Tensor):
            return ops.linear(x, self.weight, self.bias, residual=residual)
        if residual is None:
            return functional.linear(x, self.weight, self.bias)
        if self.bias is None:
            return torch.addmm(residual, x, self.weight.t())
        return residual + functional.linear(x, self.weight, self.bias)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory."""
        yield from tensors_of(self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Shared:
    """A product of which every rank has some output channels, and gets all.

    Attributes:
        product: of this rank's channels.
        widths: channels of every rank, in order.
        ranks: who they are.
    """

    product: Product
    widths: tuple[int, ...]
    ranks: Ranks

    def __call__(self, x: Given) -> torch.Tensor:
        """Return x [T, IC] multiplied: [T, sum of widths]."""
        return self.ranks.side_by_side(self.product(x), self.widths)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory of this rank."""
        yield from self.product.tensors()


@dataclass(frozen=True, slots=True)
class Products:
    """Several products of one x, side by side: weights of different schemes that cannot be stacked into one."""

    parts: tuple[Product, ...]

    def __call__(self, x: Given) -> torch.Tensor:
        """Return what the products make of x [T, IC], one behind the other: [T, sum of OC]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory."""
        for part in self.parts:
            yield from part.tensors()


@dataclass(frozen=True, slots=True)
class GatedProduct:
    """silu(x @ G^T + bias_G) * (x @ U^T + bias_U), or what another gate makes of both, in one launch a row set.

    Attributes:
        weight: `PackedWeight.gate_up` of both, or that of mixed or pruned weights.
        bias: interleaved likewise, or `None`.
        gate: how gate and up become one.
    """

    weight: PackedWeight | MixedWeight | SparseWeight | TiledSparseWeight
    bias: torch.Tensor | None = None
    gate: Gate = Gate.SILU

    def __call__(self, x: Given) -> torch.Tensor:
        """Return [T, F] of x [T, IC]."""
        if isinstance(self.weight, PackedWeight) and isinstance(x, ops.Deferred):
            return ops.linear_norm_in(x, self.weight, self.bias, gate=self.gate)
        if isinstance(self.weight, PackedWeight | MixedWeight) and isinstance(x, ops.Quantized):
            return ops.linear_quantized(x, self.weight, self.bias, gate=self.gate)
        assert isinstance(x, torch.Tensor), "what else a norm leaves is for dense packed and mixed weights"
        return ops.gated_linear(x, self.weight, self.bias, gate=self.gate)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory."""
        yield from tensors_of(self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Activated:
    """An activation of what a product makes: of gate times up, whose channels stand one behind the other, or of up.

    Attributes:
        product: [2 F, IC], or [F, IC] without a gate.
        gate: how gate and up become one; `None` is relu without a gate.
    """

    product: Product | Products
    gate: Gate | None

    def __call__(self, x: Given) -> torch.Tensor:
        """Return [T, F] of x [T, IC]."""
        return self._of(self.product(x))

    def for_reader(self, x: Given, reader: Product) -> torch.Tensor | ops.Quantized:
        """Return [T, F] of x [T, IC] as what reads it takes it: quantised where a kernel does that at once."""
        y, weight = self.product(x), bytewise_of(reader)
        made = None if weight is None else ops.takes_activated(y, (weight,), self.gate)
        return self._of(y) if made is None else ops.activated_quantized(y, self.gate, made)

    def _of(self, y: torch.Tensor) -> torch.Tensor:
        return ops.relu(y) if self.gate is None else ops.gated(y, self.gate)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory."""
        yield from self.product.tensors()


@dataclass(frozen=True, slots=True)
class FeedForward:
    """down(activation(up(x))), with a gate or without one."""

    up: GatedProduct | Activated
    down: Product

    def __call__(self, x: Given, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return [T, H] of x [T, H], with `residual` added."""
        return self.down(self.inner(x), residual)

    def inner(self, x: Given) -> torch.Tensor | ops.Quantized:
        """Return [T, F] of x [T, H], as `down` takes it."""
        return self.up.for_reader(x, self.down) if isinstance(self.up, Activated) else self.up(x)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory."""
        yield from self.up.tensors()
        yield from self.down.tensors()


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows of a weight [V, H], and of learned positions where a model has them.

    Attributes:
        weight: plain, or packed in the stored stream, in one scheme.
        dtype: of the rows.
        scale: they are multiplied by it.
        positions: [P, H], or `None`; its row `first` is added to a text's first token.
        first: see there.
        start: the token of the first row of `weight`.
        ranks: that have some of the rows each.
    """

    weight: torch.Tensor | PackedWeight
    dtype: torch.dtype
    scale: float = 1.0
    positions: torch.Tensor | None = None
    first: int = 0
    start: int = 0
    ranks: Ranks = ALONE

    def __call__(self, tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Return [T, H] of the tokens [T] of a step's rows."""
        if self.ranks.count == 1 and not isinstance(self.weight, PackedWeight):
            return ops.lookup(
                tokens, self.weight, scale=self.scale, positions=self.positions, first=self.first, rows=rows
            )
        found = self._rows(tokens)
        if self.scale != 1.0:
            found = found * self.scale
        if self.positions is not None:
            found = found + ops.lookup(places(rows, len(tokens), self.first), self.positions)
        return found

    def _rows(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.ranks.count == 1:
            assert isinstance(self.weight, PackedWeight)
            return ops.embedding(tokens, self.weight, self.dtype)
        own = tokens - self.start
        if not isinstance(self.weight, PackedWeight):
            return self.ranks.sum(ops.lookup(own, self.weight))  # zeros where another rank has the row
        known = own.clamp(0, self.weight.shape[0] - 1)
        found = ops.embedding(known, self.weight, self.dtype)
        return self.ranks.sum(torch.where((known == own)[:, None], found, 0))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory."""
        yield from tensors_of(self.weight, self.positions)


def bytewise_of(product: object) -> PackedWeight | MixedWeight | None:
    """Return the weight of a product ahead of which rows may be quantised: packed or mixed, without outliers."""
    weight = product.weight if isinstance(product, Product | GatedProduct) else None
    if isinstance(weight, PackedWeight):
        return weight if weight.outliers is None else None
    return weight if isinstance(weight, MixedWeight) else None


def tensors_of(*weights: Matrix | Stack | None) -> Iterator[torch.Tensor]:
    """Yield the tensors that weights and biases are held in; `None` has none."""
    for weight in weights:
        if isinstance(weight, torch.Tensor):
            yield weight
        elif isinstance(weight, MixedWeight | StackedMixedWeight):
            yield from tensors_of(*weight.sets, weight.features, weight.places)
        elif isinstance(weight, SparseWeight | TiledSparseWeight):
            yield from weight.tensors()
        elif weight is not None:
            held = (weight.data, weight.scale, weight.zero_point, weight.outliers, weight.arranged)
            yield from (tensor for tensor in held if tensor is not None)
