"""What does a norm of transformers compute? A copy of its module is asked, with weights and numbers of our own."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from tersor.compress.rotation import Rotation

_ROWS = 4
_WITHIN = 1e-3
"""Relative distance of what is equal in float32 up to rounding."""


@dataclass(frozen=True, slots=True)
class NormForm:
    """How the weight of a norm enters its output.

    Attributes:
        offset: the gain of a channel is its weight plus this: 0, or 1 as in Gemma.
        turns: whether a rotation of all channels passes through it where gains are 1: an RMS norm's does, that of a
            layer norm, which subtracts the mean, does not.
    """

    offset: float
    turns: bool


def norm_form(module: nn.Module) -> NormForm | None:
    """Return what kind of norm a module is, on whatever device it is; `None` where it is none.

    A norm here is a module with a weight of one axis, and at most a bias, that scales each channel of its output by its
    weight.
    """
    names = {name for name, parameter in module.named_parameters() if parameter is not None}
    weight = getattr(module, "weight", None)
    if "weight" not in names or names - {"weight", "bias"} or weight is None or weight.dim() != 1:
        return None
    mine = copy.deepcopy(module).to_empty(device="cpu").float()
    drawing = torch.Generator().manual_seed(0)
    x, gains = torch.randn(_ROWS, len(weight), generator=drawing), torch.rand(len(weight), generator=drawing) + 0.5

    def ask(value: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        mine.weight = nn.Parameter(value, requires_grad=False)
        if "bias" in names:
            mine.bias = nn.Parameter(torch.zeros(len(value)), requires_grad=False)
        output: torch.Tensor = mine(given)
        return output

    try:
        with torch.no_grad():
            nothing, one, chosen = (ask(value, x) for value in (torch.zeros_like(gains), gains / gains, gains))
            for offset, unit in ((0.0, one), (1.0, nothing)):
                if _near(chosen, unit * (gains + offset)) and _near(one, unit * (1 + offset)):
                    plain = torch.full_like(gains, 1 - offset)
                    rotation = Rotation.of(len(gains), 0)
                    turned = ask(plain, rotation.columns(x))
                    return NormForm(offset, _near(turned, rotation.columns(ask(plain, x))))
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it takes something else than hidden states
        return None
    return None


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    size = float(expected.norm())
    return found.shape == expected.shape and size > 0 and float((found - expected).norm()) <= _WITHIN * size
