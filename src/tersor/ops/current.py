"""What is current in this thread? Device, stream, capture and memory, in numbers: objects cost a microsecond each.

torch keeps the quick functions for the code that torch.compile generates; where one is missing its public twin serves.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., object])


def _quick(module: str, name: str, twin: _Function) -> _Function:
    """Return a private function of torch, or its public twin where this torch has none."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return twin


def _device() -> int:
    return torch.cuda.current_device()


def _stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def _empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


device: Callable[[], int] = _quick("torch._C", "_cuda_getDevice", _device)
"""Return the index of the current CUDA device; CUDA is initialised."""

stream: Callable[[int], int] = _quick("torch._C", "_cuda_getCurrentRawStream", _stream)
"""Return the handle of the current stream of a CUDA device."""

capturing: Callable[[], bool] = _quick(
    "torch._C", "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)
"""Tell whether the current stream of the current device is captured into a CUDA graph."""

empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] = _quick(
    "torch._C._dynamo.guards", "_empty_strided_cuda", _empty
)
"""Return an uninitialised tensor of a size, strides and a dtype on the current CUDA device."""


def same_stream(device: torch.device) -> Callable[[], None] | None:
    """Return what another thread calls to launch on the stream of a GPU that is current in this one; `None` of a CPU.

    A thread begins on the default stream, which neither waits for a stream that this one may be on, nor is waited for:
    what both launch would run in any order.
    """
    if device.type != "cuda":
        return None
    return functools.partial(torch.cuda.set_stream, torch.cuda.current_stream(device))
