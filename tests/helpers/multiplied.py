"""What kernels multiply activations with, in float64: decoded weights or, of groups beside int8, whole rows."""

from __future__ import annotations

import torch

from tersor.formats import Activations
from tersor.layouts import MixedWeight, PackedWeight, ratios


def multiplied(weight: PackedWeight | MixedWeight, activations: Activations) -> torch.Tensor:
    """Return the numbers, float64 [OC, IC], of a weight as it is stored."""
    if isinstance(weight, MixedWeight):
        return weight.in_order([multiplied(one, activations).T for one in weight.sets]).T.contiguous()
    if activations is not Activations.INT8 or not ratios.applies(weight.scheme):
        return weight.dequantize(torch.float64)
    numbers, scale = ratios.whole_numbers(weight.codes(), *weight.stored_scales(), weight.scheme)
    return numbers.double() * scale.double()
