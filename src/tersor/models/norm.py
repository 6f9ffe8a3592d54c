"""Norms over the channels of a token, with their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tersor import ops
from tersor.formats import Activations
from tersor.kernels.deciding import MOST_SUMMED_CHANNELS
from tersor.layouts import MixedWeight, PackedWeight
from tersor.models.config import Norm
from tersor.models.weights import Activated, Between, GatedProduct, Given, Product, Products, bytewise_of, tensors_of
from tersor.ops.quantized import common_activations


@dataclass(frozen=True, slots=True)
class NormWeights:
    """A norm of the channels of a token.

    Attributes:
        form: of the norm.
        weight: [H].
        bias: [H] of a centered norm, else `None`.
        folded: the norm as the products around it take it, where it may be a part of those, else `None`.
    """

    form: Norm
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    folded: ops.FoldedNorm | None = None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return x [T, H] normed, with `residual` added."""
        if not self.form.centered:
            return ops.rms_norm(x, self.weight, self.form.eps, offset=self.form.offset, residual=residual)
        y = ops.layer_norm(x, self.weight, self.bias, self.form.eps)
        return y if residual is None else y + residual

    def quantized(self, x: torch.Tensor, activations: Activations) -> ops.Quantized:
        """Return x [T, H] normed, as such activations."""
        if not self.form.centered:
            return ops.rms_norm_quantized(
                x, self.weight, self.form.eps, offset=self.form.offset, activations=activations
            )
        return ops.layer_norm_quantized(x, self.weight, self.bias, self.form.eps, activations=activations)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory."""
        yield from tensors_of(self.weight, self.bias, None if self.folded is None else self.folded.weight)


def normed(norm: NormWeights, x: Between, reader: object) -> Given:
    """Return rows [T, H] normed, as what reads them takes them: quantised where a kernel does that at once.

    Args:
        norm: stands before the reader.
        x: rows, whose norm may be done, or all of it but a division.
        reader: what reads the norm's result, and nothing else does.
    """
    if isinstance(x, ops.Normed):
        return x.y
    if isinstance(x, ops.Deferred):
        return x
    weights = weights_read(reader) if isinstance(norm, NormWeights) else ()
    made = ops.takes_quantized(x, weights, norm.weight, norm.bias) if weights else None
    if made is not None:
        return norm.quantized(x, made)
    return norm(x)


def gain_of(norm: NormWeights, most: int = MOST_SUMMED_CHANNELS) -> ops.Gain | None:
    """Return an RMS norm as the launches around experts have it, or `None`.

    Args:
        norm: any.
        most: channels that a launch takes.
    """
    form = norm.form
    if form.centered or len(norm.weight) > most:
        return None
    return ops.Gain(norm.weight, form.eps, form.offset)


def behind_sum(norm: NormWeights, reader: object) -> ops.Gain | None:
    """Return a norm as the launch has it that adds up what experts gave; `None` where it is a part of no such launch.

    Args:
        norm: stands between that sum and the reader.
        reader: what reads the norm's result: not where it takes bytes, which the norm makes of it.
    """
    weights = weights_read(reader)
    if common_activations(weights) is not Activations.NATIVE:
        return None
    return gain_of(norm)


def weights_read(reader: object) -> tuple[PackedWeight | MixedWeight, ...]:
    """Return the weights of what reads a norm's result, where that is packed or mixed products alone, else none."""
    product = reader.product if isinstance(reader, Activated) else reader
    parts = product.parts if isinstance(product, Products) else (product,)
    found = tuple(weight for part in parts if (weight := bytewise_of(part)) is not None)
    return found if len(found) == len(parts) else ()


def foldable(norm: NormWeights, reader: object) -> NormWeights:
    """Return a norm as it was or, where what reads its result is one packed product, as a part of that, too."""
    form = norm.form
    if form.centered or _packed(reader) is None:
        return norm
    return replace(norm, folded=ops.FoldedNorm.of(norm.weight, form.eps, form.offset))


def fold(norm: NormWeights, x: torch.Tensor, first: Product, reader: object) -> ops.FoldedNorm | None:
    """Return a norm as the products around it take it, where kernels have it in both, else `None`.

    Args:
        norm: stands between the two.
        x: activations [T, IC] of the first product.
        first: the product whose result is normed.
        reader: what reads the norm's result.
    """
    around = weights_around(norm, first, reader)
    return norm.folded if around and ops.folds_norm(x, *around, _gate(reader)) else None


def _gate(reader: object) -> int:
    """Return how what reads a norm's result ends, where it is gate and up in one, or 0."""
    return int(reader.gate) if isinstance(reader, GatedProduct) else 0


def weights_around(norm: NormWeights, first: Product, reader: object) -> tuple[PackedWeight, PackedWeight] | None:
    """Return the weights of the products that a norm may be a part of, or `None` where it may not; as for `fold`."""
    second = _packed(reader)
    if norm.folded is None or second is None or not isinstance(first.weight, PackedWeight):
        return None
    return None if first.weight.outliers is not None else (first.weight, second)


def _packed(reader: object) -> PackedWeight | None:
    """Return the weight of what reads a norm's result, where that is one packed product without outliers."""
    weight = bytewise_of(reader.product if isinstance(reader, Activated) else reader)
    return weight if isinstance(weight, PackedWeight) else None
