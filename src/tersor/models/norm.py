"""Norms over the channels of a token, with their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tersor import ops
from tersor.layouts import PackedWeight
from tersor.models.config import Norm
from tersor.models.weights import Activated, GatedProduct, Product, tensors_of


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

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory."""
        yield from tensors_of(self.weight, self.bias, None if self.folded is None else self.folded.weight)


def fold(norm: NormWeights, x: torch.Tensor, first: Product, second: object) -> ops.FoldedNorm | None:
    """Return a norm as the products around it take it, where kernels have it in both, else `None`.

    Args:
        norm: stands between the two.
        x: activations [T, IC] of the first product.
        first: the product whose result is normed.
        second: what reads the norm's result.
    """
    product = second.product if isinstance(second, Activated) else second
    if norm.folded is None or not isinstance(product, Product | GatedProduct):
        return None
    if not isinstance(first.weight, PackedWeight) or not isinstance(product.weight, PackedWeight):
        return None
    serves = ops.folds_norm(x, first.weight, product.weight, isinstance(product, GatedProduct))
    return norm.folded if serves else None
