"""What tensor cores drop of sums of products of e4m3, bounded by how they add, and their arithmetic itself.

32 products and the sum so far are cut, toward zero, behind the 13th bit after the leading one of the largest of them;
so is their sum. An H200 gave 58.90625 in float16 where that arithmetic gives 58.913 and 59.152 is exact.
"""

from __future__ import annotations

import torch

STEP = 32
"""Channels of an instruction."""
BLOCK = 128
"""Channels after which sums may begin anew."""
SETTLED = 4
"""Blocks at most whose products meet before they are added to float32 sums."""
_CUT = 2.0**-13


def e4m3_dropped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Bound |y - x @ weight^T| where tensor cores add in steps of channels, and sums begin anew at any block.

    What is dropped of a number has its sign, is at most the number and less than the last bit kept, which is that of
    the sum so far where this is large: products of one sign lose most, more than any small share of their sum.

    Args:
        x: float64 [N, IC], codes with any scale a token.
        weight: float64 [OC, IC], codes with any scale a row.

    Returns:
        float64 [N, OC].
    """
    x, weight = _padded(x), _padded(weight)
    total = x.new_zeros(len(x), len(weight))
    down, up = total.clone(), total.clone()
    starts: list[torch.Tensor] = []  # sums of all channels before each block that those so far may begin with
    for first in range(0, x.shape[1], STEP):
        if first % BLOCK == 0:
            starts = [*starts, total][-SETTLED:]
        products = x[:, None, first : first + STEP] * weight[None, :, first : first + STEP]
        before, total = total, total + products.sum(dim=2)
        sums = torch.stack([(one - start).abs() for start in starts for one in (before, total)]).amax(dim=0)
        last_bit = _CUT * torch.maximum(sums, products.abs().amax(dim=2))
        for lost, sign in ((down, 1), (up, -1)):
            lost += torch.minimum((sign * products).clamp(min=0), last_bit[..., None]).sum(dim=2) + 2 * last_bit
    return torch.maximum(down, up)


def e4m3_sums(x: torch.Tensor, weight: torch.Tensor, blocks: int = SETTLED) -> torch.Tensor:
    """Return x @ weight^T as tensor cores add, settled after so many blocks; codes as float64, [N, OC]."""
    x, weight = _padded(x), _padded(weight)
    settled = x.new_zeros(len(x), len(weight))
    sums = settled.clone()
    for first in range(0, x.shape[1], STEP):
        one, other = x[:, None, first : first + STEP], weight[None, :, first : first + STEP]
        numbers = torch.cat([one * other, sums[..., None]], dim=2)
        leading = torch.cat([_leading(one) * _leading(other), _leading(sums)[..., None]], dim=2).amax(dim=2)
        sums = _cut(numbers, leading[..., None]).sum(dim=2)
        sums = _cut(sums, _leading(sums))
        if (first + STEP) % (BLOCK * blocks) == 0:
            settled, sums = settled + sums, torch.zeros_like(sums)
    return settled + sums


def _padded(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers [..., IC] and zeros up to a whole block."""
    return torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % BLOCK))


def _leading(numbers: torch.Tensor) -> torch.Tensor:
    """Return the power of two of each number's leading bit; 0 of zero."""
    return torch.where(numbers == 0, 0.0, torch.exp2(torch.frexp(numbers).exponent.double() - 1))


def _cut(numbers: torch.Tensor, leading: torch.Tensor) -> torch.Tensor:
    """Return numbers without what stands behind the 13th bit after `leading`; 0 where that is 0."""
    last_bit = torch.where(leading == 0, 1.0, leading * _CUT)
    return torch.trunc(numbers / last_bit) * last_bit
