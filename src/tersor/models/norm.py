"""Norms over the channels of a token, with their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tersor import ops
from tersor.models.config import Norm
from tersor.models.weights import tensors_of


@dataclass(frozen=True, slots=True)
class NormWeights:
    """A norm of the channels of a token.

    Attributes:
        form: of the norm.
        weight: [H].
        bias: [H] of a centered norm, else `None`.
    """

    form: Norm
    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return x [T, H] normed, with `residual` added."""
        if not self.form.centered:
            return ops.rms_norm(x, self.weight, self.form.eps, offset=self.form.offset, residual=residual)
        y = ops.layer_norm(x, self.weight, self.bias, self.form.eps)
        return y if residual is None else y + residual

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory."""
        yield from tensors_of(self.weight, self.bias)
