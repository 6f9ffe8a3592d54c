"""How exact must a product be? One bound, from the accumulator, the output dtype and the length of the sum."""

from __future__ import annotations

import torch


def product_tolerance(x: torch.Tensor, weight: torch.Tensor, output_dtype: torch.dtype) -> torch.Tensor:
    """Bound |y - x @ weight^T| for a product accumulated in float32 and rounded once to `output_dtype`.

    Summing n terms in float32, in any order, errs by at most about (n + 8) * 2^-24 * sum |x_k w_k| (Higham, Accuracy
    and Stability of Numerical Algorithms, section 4.2; 8 for the scale, the bias and the roundings of a split sum).
    The products themselves are exact in float32. The final rounding adds half a unit in the last place of the
    result, or half the smallest subnormal.

    Args:
        x: float64 [N, IC], the activations.
        weight: float64 [OC, IC], the decoded weight with its scales.
        output_dtype: dtype of the result.

    Returns:
        float64 [N, OC], the largest allowed absolute error.
    """
    magnitude = x.abs() @ weight.abs().T
    accumulated = (x.shape[1] + 8) * 2.0**-24 * magnitude
    if output_dtype == torch.float32:
        return accumulated + torch.finfo(torch.float32).tiny
    info = torch.finfo(output_dtype)
    exact = (x @ weight.T).abs()
    return accumulated + (exact + accumulated) * info.eps / 2 + info.smallest_normal * info.eps
