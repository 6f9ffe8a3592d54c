"""Scales of groups as whole ratios to one scale a row, so that codes in groups become int8 of the whole row.

Beside int8 activations with a scale a token, a code q less zero point z, in a group of scale s, a row of scale t, is

    (r (q - z) + 128) >> 8    with    r = round(256 s / t)    and    t = max over groups of s max(|z|, |most - z|) / 127

of float32 numbers, s * (256 / t) rounded once, ties to even; `most` is the largest code. That is a whole number of at
most 127 of the row's scale. Products with int8 activations are then whole from the first to the last channel of a row:
no sum of a group is scaled. QServe (arXiv 2405.04532, section 4.1) stores weights of two such levels; here they are
made, while codes are decoded, of any weight in groups. What is rounded is up to half of a 127th of a row's largest
number, where the codes themselves round up to half of a 15th (4 bits) or a 31st (5 bits) of a group's range. So it is
done up to `MOST_BITS`.
"""

from __future__ import annotations

import torch

from tersor.formats import Scheme, scale_values

MOST_BITS = 5
"""Wider codes have as many steps in a group as int8 has in a row, and keep their scales apart."""
TERM_BYTES = 8
"""What `row_terms` takes of a row."""
_ONE = 256
_MOST = 127


def applies(scheme: Scheme) -> bool:
    """Whether codes of a scheme become int8 by ratios, where activations are int8 with a scale a token."""
    return scheme.group_size is not None and scheme.format.kind != "float" and scheme.format.bits <= MOST_BITS


def row_terms(scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """Return float32 [OC, 2]: t, and 256 / t, which makes ratios of scales; 0 where there is no such number.

    Args:
        scale: [OC, G] in the scheme's scale dtype.
        zero_point: uint8 [OC, G], or `None` where the format has none.
        scheme: what they mean.
    """
    zero, most = _zero(scale, zero_point, scheme).to(torch.float32), (1 << scheme.format.bits) - 1
    reach = torch.maximum(zero.abs(), (most - zero).abs())
    largest = (scale_values(scale, scheme).abs() * reach).amax(dim=1)
    own = largest / torch.full_like(largest, _MOST)
    inverse = torch.full_like(own, _ONE) / own
    return torch.stack((own, torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))), dim=1)


def whole_numbers(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whole numbers, float32 [OC, IC], and the scales of their rows, float32 [OC, 1].

    Args:
        codes: uint8 [OC, IC].
        scale, zero_point, scheme: as in `row_terms`.
    """
    terms = row_terms(scale, zero_point, scheme)
    exact = scale_values(scale, scheme).double() * terms[:, 1:].double()  # of float32: nothing is rounded yet
    ratios, group_size = exact.nan_to_num(0, 0, 0).round().to(torch.int32), scheme.group_size or codes.shape[1]
    zeros = _zero(scale, zero_point, scheme).expand_as(ratios)
    ratios, zeros = (each.repeat_interleave(group_size, dim=1)[:, : codes.shape[1]] for each in (ratios, zeros))
    numbers = (ratios * (codes.to(torch.int32) - zeros) + _ONE // 2) >> 8
    return numbers.to(torch.float32), terms[:, :1]


def _zero(scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """Return what is taken off codes: int32 [OC, G] or, of formats without zero points, [1, 1]."""
    if zero_point is not None:
        return zero_point.to(torch.int32)
    return torch.full((1, 1), scheme.format.bias, dtype=torch.int32, device=scale.device)
