"""Device memory that kernels borrow: parts of split sums and the counters of who has arrived.

Launches on one stream follow each other, so they may share; each stream, and each stream of each CUDA graph under
capture, has its own. A graph's lies in the graph's memory, is cleared once a replay, and every launch leaves its
counters at zero.
"""

from __future__ import annotations

import threading

import torch

_workspaces: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
_guard = threading.Lock()
_MAX_CAPTURES = 64


def split_sums(device: torch.device, stream: int, floats: int, counters: int) -> tuple[int, int]:
    """Return addresses of at least `floats` float32 and `counters` zeroed uint32 for launches on `stream`.

    Args:
        device: the CUDA device, current.
        stream: handle of the current stream.
        floats: float32 elements for parts; their content is undefined.
        counters: uint32 elements that are zero between launches.
    """
    capture = _capture_id(stream) if torch.cuda.is_current_stream_capturing() else 0
    key = (device.index if device.index is not None else torch.cuda.current_device(), stream, capture)
    held = _workspaces.get(key)
    if held is None or held[0].numel() < floats or held[1].numel() < counters:
        held = _allocate(key, held, floats, counters, device)
    return held[0].data_ptr(), held[1].data_ptr()


def _allocate(
    key: tuple[int, int, int],
    held: tuple[torch.Tensor, torch.Tensor] | None,
    floats: int,
    counters: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    if held is not None:
        floats, counters = max(floats, held[0].numel()), max(counters, held[1].numel())
    fresh = (
        torch.empty(floats, dtype=torch.float32, device=device),
        torch.zeros(counters, dtype=torch.int32, device=device),
    )
    with _guard:
        captures = [known for known in _workspaces if known[2]]
        for known in captures[: len(captures) - _MAX_CAPTURES]:
            del _workspaces[known]
        _workspaces[key] = fresh
    return fresh


def _capture_id(stream: int) -> int:
    from cuda.bindings import driver

    result = driver.cuStreamGetCaptureInfo(stream)
    return int(result[2])
