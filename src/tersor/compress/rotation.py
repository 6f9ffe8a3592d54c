"""Rotations that spread what a channel holds over all channels: randomised Hadamard matrices of any size.

A model computes the same when what it reads and writes between its blocks is rotated and its weights are rotated back
(QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406); weights without outliers then lose less when they are rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_LARGEST_FACTOR = 64
"""Powers of two are taken apart into Hadamard matrices of at most this many rows."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """An orthogonal matrix R = D (F_1 x F_2 x ...), a diagonal of signs times a Kronecker product.

    A size 2^k m, m odd, has Hadamard matrices for 2^k and the discrete Hartley matrix of m, whose entries are within a
    factor of sqrt(2) of the flattest that there can be.

    Attributes:
        signs: float32 [n], -1 and 1.
        factors: symmetric orthogonal matrices, float32, the product of whose sizes is n.
    """

    signs: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    @staticmethod
    def of(size: int, seed: int) -> Rotation:
        """Return the rotation of `size` channels that belongs to a seed."""
        drawing = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size,), generator=drawing).float() * 2 - 1
        factors, left = [], size
        while left % 2 == 0:
            factor = math.gcd(left, _LARGEST_FACTOR)
            factors.append(_hadamard(factor))
            left //= factor
        if left > 1:
            factors.append(_hartley(left))
        return Rotation(signs, tuple(factors))

    @property
    def size(self) -> int:
        """Channels, n."""
        return len(self.signs)

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """Return x R for x [..., k n], float32: every n channels are rotated."""
        turned = x.float().unflatten(-1, (-1, self.size)) * self.signs.to(x.device)
        shape = turned.shape
        turned = turned.reshape(-1, *(len(factor) for factor in self.factors))
        for axis, factor in enumerate(self.factors, start=1):
            turned = torch.movedim(torch.tensordot(turned, factor.to(x.device), dims=([axis], [0])), -1, axis)
        return turned.reshape(shape).flatten(-2)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Return R^T W for W [k n, ...], float32: what a layer writes comes out rotated."""
        return self.columns(weight.movedim(0, -1)).movedim(-1, 0)


def _hadamard(size: int) -> torch.Tensor:
    """Return Sylvester's matrix of a power of two, over its square root."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _hartley(size: int) -> torch.Tensor:
    """Return (cos t + sin t) / sqrt(size) of t = 2 pi j k / size."""
    index = torch.arange(size, dtype=torch.float64)
    angle = (index[:, None] * index[None, :]).remainder(size) * (2 * math.pi / size)
    return ((angle.cos() + angle.sin()) / math.sqrt(size)).float()
