"""Round to nearest: one scale a row or a group from the largest magnitude, no calibration.

This is the recipe of ZeroQuant(4+2) (arXiv 2312.08583) and FP6-LLM (arXiv 2401.14112): scale = amax / format max,
then every weight goes to the nearest code.
"""

from __future__ import annotations

import torch

from tersor.errors import NonFiniteError
from tersor.formats import Encoded, Scheme, scale_values, store_scales


def quantize_rtn(weight: torch.Tensor, scheme: Scheme) -> Encoded:
    """Quantise a weight by rounding to nearest.

    Rows do not influence each other, so a matrix may be handed over in blocks of rows.

    Args:
        weight: [OC, IC], float16, bfloat16 or float32, any device.
        scheme: element format and scales.

    Returns:
        The codes, scales and the squared error; a row or group of zeros has scale 0 (E8M0: its smallest scale) and
        decodes to 0.

    Raises:
        NonFiniteError: the weight holds a NaN or an infinity, with its index.
        FormatError: the group size does not divide IC, or a scale does not fit its dtype.
    """
    oc, ic = weight.shape
    groups = scheme.groups(ic)
    grouped = weight.reshape(oc, groups, ic // groups).to(torch.float32)
    fmt = scheme.format
    zero_point = None
    if fmt.kind == "uint":
        low = grouped.amin(dim=2).clamp_max_(0)
        high = grouped.amax(dim=2).clamp_min_(0)
        _check_finite(weight, low + high)
        scale = store_scales(_share(high - low, fmt.max), scheme)
        divisor = _divisor(scale, scheme)
        zero_point = (-low / divisor).round_().clamp_(0, fmt.max).to(torch.uint8)
    else:
        amax = grouped.abs().amax(dim=2)
        _check_finite(weight, amax)
        scale = store_scales(_share(amax, fmt.max), scheme)
        divisor = _divisor(scale, scheme)
    scaled = grouped / divisor.unsqueeze(2)
    if zero_point is not None:
        scaled = scaled.round_().add_(zero_point.unsqueeze(2))
    codes, rounded = fmt.round(scaled)
    if zero_point is not None:
        rounded = rounded.sub_(zero_point.unsqueeze(2))
    error = rounded.mul_(scale_values(scale, scheme).unsqueeze(2)).sub_(grouped)
    return Encoded(
        scheme=scheme,
        codes=codes.view(oc, ic),
        scale=scale,
        zero_point=zero_point,
        squared_error=_squared_sum(error),
        squared_norm=_squared_sum(grouped),
    )


def _share(extent: torch.Tensor, maximum: float) -> torch.Tensor:
    """Divide by a tensor: by a number, a GPU multiplies with the reciprocal, and the last bit may differ."""
    return extent / torch.full((), maximum, device=extent.device)


def _divisor(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return the scales as float32, with 1 in place of 0: what is divided there is 0."""
    values = scale_values(scale, scheme)
    return torch.where(values > 0, values, 1.0)


def _check_finite(weight: torch.Tensor, extremes: torch.Tensor) -> None:
    """Raise when `extremes`, which is not finite where `weight` is not, says so."""
    if bool(torch.isfinite(extremes).all()):
        return
    position = (~torch.isfinite(weight)).nonzero()[0]
    index = tuple(int(axis) for axis in position)
    raise NonFiniteError(index, float(weight[index]))


def _squared_sum(x: torch.Tensor) -> float:
    flat = x.reshape(-1)
    return float(torch.dot(flat, flat))
