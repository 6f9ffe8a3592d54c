"""Putting packed layers into a model, and taking them out again."""

from __future__ import annotations

import torch
from torch import nn

from tersor.errors import UnsupportedError
from tersor.formats import Scheme
from tersor.nn.experts import PackedExperts
from tersor.nn.linear import PackedLinear

_SAME_AS_LINEAR = ("FalconLinear",)
"""Subclasses of `nn.Linear` in transformers with a forward of their own that computes the same."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's Conv1D: a linear layer that keeps its weight as [IC, OC]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (OC, IC) of a linear layer that a `PackedLinear` can stand for, `None` for any other module."""
    if is_conv1d(module):
        return int(module.nf), int(module.nx)  # type: ignore[arg-type]
    plain = type(module).forward is nn.Linear.forward or type(module).__name__ in _SAME_AS_LINEAR
    if isinstance(module, nn.Linear) and plain:
        return module.out_features, module.in_features
    return None


def swap_linear(model: nn.Module, name: str, scheme: Scheme, dtype: torch.dtype | None = None) -> PackedLinear:
    """Replace a linear layer of a model by a packed one on the same device, which keeps the bias.

    Args:
        model: holds the layer.
        name: the layer's name in the model.
        scheme: of the packed layer.
        dtype: of activations; that of the old weight when `None`.

    Raises:
        UnsupportedError: the module is not a linear layer.
        FormatError: the group size does not divide IC.
    """
    old = model.get_submodule(name)
    shape = linear_shape(old)
    if shape is None:
        raise UnsupportedError(f"{name} is a {type(old).__name__}, which cannot run packed: ignore it")
    weight: torch.Tensor = old.weight  # type: ignore[assignment]
    oc, ic = shape
    new = PackedLinear(ic, oc, scheme, device=weight.device, dtype=dtype or weight.dtype)
    new.bias = getattr(old, "bias", None)
    new.transposed = is_conv1d(old)
    new.train(old.training)
    model.set_submodule(name, new)
    return new


def unpack_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every packed layer by what it stands for: Linear, Conv1D or fused experts, decoded to `dtype`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            model.set_submodule(name, _fused(module, dtype))
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(name, _plain(module, dtype))


def _fused(module: PackedExperts, dtype: torch.dtype) -> nn.Module:
    experts: nn.Module = module.template
    for name, weight in module.fused_weights(dtype).items():
        setattr(experts, name, nn.Parameter(weight, requires_grad=False))
    return experts


def _plain(module: PackedLinear, dtype: torch.dtype) -> nn.Module:
    weight = module.packed_weight().dequantize(dtype)
    with torch.device("meta"):
        plain: nn.Module
        if module.transposed:
            from transformers.pytorch_utils import Conv1D

            plain = Conv1D(module.out_features, module.in_features)
            weight = weight.T.contiguous()
        else:
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return plain.train(module.training)
