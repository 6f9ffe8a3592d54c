"""Does a weight lie still? Then no kernel just ahead writes it, and a launch may fetch it early."""

from __future__ import annotations

import weakref

import torch

_used: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor], int | None, int | None]] = {}
"""Identity of a weight's data -> data, scale and their versions at the last launch that used both; inference tensors
have no versions."""


def settled(data: torch.Tensor, scale: torch.Tensor) -> bool:
    """Tell whether a launch has used both since they were last written: then no kernel just ahead writes them."""
    name = id(data)
    used = _used.get(name)
    if used is not None and used[0]() is data and used[1]() is scale:
        _, _, of_data, of_scale = used
        if (of_data is None or of_data == data._version) and (of_scale is None or of_scale == scale._version):
            return True
    of_data = None if data.is_inference() else data._version
    of_scale = None if scale.is_inference() else scale._version
    _used[name] = (weakref.ref(data, lambda gone: _forget(name, gone)), weakref.ref(scale), of_data, of_scale)
    return False


def _forget(name: int, gone: weakref.ref[torch.Tensor]) -> None:
    used = _used.get(name)
    if used is not None and used[0] is gone:
        del _used[name]
