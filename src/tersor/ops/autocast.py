"""What torch.autocast means for packed weights: operators cast activations as `torch.nn.functional.linear` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DEVICES = ("CPU", "CUDA")
"""Backends whose autocast reaches the operators, as torch's dispatcher spells them."""

enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Tell whether autocast is on for any device."""

_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def activation_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which activations meet a weight: autocast's where it is on for their device, else their own.

    Args:
        x: activations; float64 stays, as everywhere under autocast.
    """
    kind = x.device.type
    if not enabled() or not _eligible(x) or kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def casting(operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the autocast kernel of an operator: floats of its first argument's device are cast, but for its weight.

    Args:
        operator: takes x, then codes, scales and zero points, which stay as they are.
    """

    def kernel(x: torch.Tensor, data: Any, scale: Any, zero_point: Any, *rest: Any) -> torch.Tensor:
        dtype = activation_dtype(x)

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, torch.Tensor) and _eligible(value) else value

        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return operator(cast(x), data, scale, zero_point, *map(cast, rest))

    return kernel


def ignoring(operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the autocast kernel of an operator whose arithmetic has its own dtypes: nothing within is cast."""

    def kernel(*arguments: Any) -> torch.Tensor:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return operator(*arguments)

    return kernel


def _eligible(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float64
