"""Round to nearest: one scale a row or a group from the largest magnitude, no calibration.

This is the recipe of ZeroQuant(4+2) (arXiv 2312.08583) and FP6-LLM (arXiv 2401.14112): scale = amax / format max,
then every weight goes to the nearest code.
"""

from __future__ import annotations

import torch

from tersor.compress.outliers import quantize_beside
from tersor.compress.tables import fit_tables, nearest_codes, store_tables
from tersor.errors import NonFiniteError
from tersor.formats import SCALE_DTYPES, Encoded, ScaleError, Scheme, dtype_name, scale_values, store_scales

_PLAIN_SUMS = (1e-20, 1e30)
"""Sums of squares in float32 between these are right: what underflows in a square is far below the sum."""
_FAR_OFF = 1 / 16
"""A scale that differs more than this, relative to the one wanted, costs more than the format's own rounding."""


def quantize_rtn(weight: torch.Tensor, scheme: Scheme, wanted: torch.Tensor | None = None) -> Encoded:
    """Quantise a weight by rounding to nearest.

    Rows do not influence each other, so a matrix may be handed over in blocks of rows.

    Args:
        weight: [OC, IC], float16, bfloat16 or float32, any device.
        scheme: element format and scales.
        wanted: bool [OC, IC], the weights that codes are for, where they are not for all: the others are zero and stay
            so, or, where there is a table, count for nothing.

    Returns:
        The codes, scales and the squared error; a row or group of zeros has scale 0 (E8M0: its smallest scale) and
        decodes to 0. A table is that of the least squared error. Where the scheme has outliers the largest weights of
        every row are those.

    Raises:
        NonFiniteError: the weight holds a NaN or an infinity, with its index.
        FormatError: the group size does not divide IC.
        ScaleError: a scale does not fit its dtype, or weights decode beyond their own dtype's largest number; or an
            outlier is beyond that of its own.
    """
    if scheme.outliers is not None:
        return quantize_beside(weight, scheme, quantize_rtn)
    if scheme.has_table:
        return _by_tables(weight, scheme, wanted)
    oc, ic = weight.shape
    groups = scheme.groups(ic)
    grouped = weight.reshape(oc, groups, ic // groups).to(torch.float32)
    fmt = scheme.format
    zero_point = None
    if fmt.kind == "uint":
        low = grouped.amin(dim=2).clamp_max_(0)
        high = grouped.amax(dim=2).clamp_min_(0)
        _check_finite(weight, low + high)
        extent = high - low
        wanted = _share(extent, fmt.max)
        if bool(torch.isinf(wanted).any()):
            wanted = _share(high, fmt.max) - _share(low, fmt.max)
        scale = store_scales(wanted, scheme)
        divisor = _divisor(scale, scheme)
        zero_point = (-low / divisor).round_().clamp_(0, fmt.max).to(torch.uint8)
    else:
        extent = grouped.abs().amax(dim=2)
        _check_finite(weight, extent)
        wanted = _share(extent, fmt.max)
        scale = _within(store_scales(wanted, scheme), scheme, torch.finfo(weight.dtype).max)
        divisor = _divisor(scale, scheme)
    scaled = grouped / divisor.unsqueeze(2)
    if zero_point is not None:
        scaled = scaled.round_().add_(zero_point.unsqueeze(2))
    codes, rounded = fmt.round(scaled)
    if zero_point is not None:
        rounded = rounded.sub_(zero_point.unsqueeze(2))
    decoded = rounded.mul_(scale_values(scale, scheme).unsqueeze(2))
    _check_decoded(decoded, extent, scheme, weight.dtype)
    error = decoded.sub_(grouped)
    return Encoded(
        scheme=scheme,
        codes=codes.view(oc, ic),
        scale=scale,
        zero_point=zero_point,
        squared_error=_squared_sum(error),
        squared_norm=_squared_sum(grouped),
        underflowed=_underflowed(extent, wanted, scale, scheme),
    )


def _by_tables(weight: torch.Tensor, scheme: Scheme, wanted: torch.Tensor | None) -> Encoded:
    """Round to nearest with the table of every row that makes the squared error least."""
    extent = weight.abs().amax(dim=1, keepdim=True).float()
    _check_finite(weight, extent)
    rows = weight.float()
    tables = fit_tables(rows, None if wanted is None else wanted.float())
    stored = store_tables(tables, scheme)
    codes = nearest_codes(rows, stored.float())
    decoded = stored.float().gather(1, codes)
    if wanted is not None:
        decoded.mul_(wanted)
    _check_decoded(decoded.unsqueeze(1), extent, scheme, weight.dtype)
    largest = tables.abs().amax(dim=1, keepdim=True)
    ratio = stored.float().abs().amax(dim=1, keepdim=True) / largest
    small = (largest < torch.finfo(stored.dtype).smallest_normal) & (extent > 0) & ~((ratio - 1).abs() <= _FAR_OFF)
    error = decoded.sub_(rows)
    return Encoded(
        scheme=scheme,
        codes=codes.to(torch.uint8),
        scale=stored,
        zero_point=None,
        squared_error=_squared_sum(error),
        squared_norm=_squared_sum(rows),
        underflowed=tuple(small.flatten().nonzero().flatten().tolist()),
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


def _within(scale: torch.Tensor, scheme: Scheme, limit: float) -> torch.Tensor:
    """Return scales one step smaller where rounding up took the largest code beyond the weights' own dtype."""
    if scheme.scale_dtype == "e8m0":
        return scale
    beyond = scale.double() * scheme.format.max > limit
    if not bool(beyond.any()):
        return scale
    return torch.where(beyond, torch.nextafter(scale, torch.zeros_like(scale)), scale)


def _check_decoded(decoded: torch.Tensor, extent: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> None:
    """Raise where rounding up took a weight [OC, G, group] beyond the largest number of the dtype it came in."""
    if float(extent.max()) <= torch.finfo(dtype).max / 2:
        return
    finite = decoded.to(dtype).isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ScaleError(
            row,
            f"weights of {float(extent[row].max()):.3g} in row {{row}} decode beyond {dtype_name(dtype)}'s largest "
            f"number in {scheme.name}: use another format for this tensor, or leave it alone",
        )


def _underflowed(extent: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> tuple[int, ...]:
    """Return the rows that have weights and a stored scale far from the one they need."""
    if scheme.scale_dtype == "e8m0":
        tiny = 2.0**-127
    else:
        tiny = torch.finfo(SCALE_DTYPES[scheme.scale_dtype]).smallest_normal
    small = (wanted < tiny) & (extent > 0)
    if not bool(small.any()):
        return ()
    exact = extent.double() / scheme.format.max
    ratio = scale_values(scale, scheme).double() / exact
    # The next power of two is up to twice what is wanted, by rule.
    far = ratio > 2 if scheme.scale_dtype == "e8m0" else (ratio - 1).abs() > _FAR_OFF
    return tuple((small & far).any(dim=1).nonzero().flatten().tolist())


def _squared_sum(x: torch.Tensor) -> float:
    flat = x.reshape(-1)
    total = float(torch.dot(flat, flat))
    if _PLAIN_SUMS[0] < total < _PLAIN_SUMS[1]:
        return total
    wide = flat.double()
    return float(torch.dot(wide, wide))
