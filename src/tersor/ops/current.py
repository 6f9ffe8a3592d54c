"""What is current in this thread? Device, stream and capture, as numbers: torch's objects cost a microsecond each."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _device() -> int:
    return torch.cuda.current_device()


def _stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", _device)
"""Return the index of the current CUDA device; CUDA is initialised."""

stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream)
"""Return the handle of the current stream of a CUDA device."""

capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)
"""Tell whether the current stream of the current device is captured into a CUDA graph."""
