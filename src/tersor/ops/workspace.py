"""Device memory that kernels borrow: parts of split sums and the counters of who has arrived.

Launches on one stream follow each other, so they may share; each stream has its own, kept for good. A launch under
capture takes its parts from the graph's own memory, and its counters from a stock of which each stream of each graph
gets its own. Every launch leaves its counters at zero.
"""

from __future__ import annotations

import threading

import torch

from tersor.ops import current

_LEAST_BYTES = 8 << 20
_STOCK_COUNTERS = 1 << 16
_LEAST_COUNTERS = 1 << 10

_streams: dict[tuple[int, int], tuple[int, int, int, int]] = {}
"""(device, stream) -> floats and counters, then their addresses."""
_captures: dict[tuple[int, int, int], tuple[int, int]] = {}
"""(device, stream, capture) -> counters and their address."""
_stock: dict[int, tuple[int, int]] = {}
"""Device -> counters that no graph has yet, and their address."""
_guard = threading.Lock()


def split_sums(index: int, stream: int, floats: int, counters: int) -> tuple[int, int, torch.Tensor | None]:
    """Return addresses of at least `floats` float32 and `counters` zeroed uint32 for launches on `stream`.

    Args:
        index: the CUDA device, current.
        stream: handle of its current stream.
        floats: float32 elements for parts; their content is undefined.
        counters: uint32 elements that are zero between launches.

    Returns:
        Both addresses, and what has to live until the launch is under way.

    Raises:
        KernelError: the device has no memory left.
    """
    if current.capturing():
        parts = torch.empty(floats, dtype=torch.float32, device=torch.device("cuda", index))
        return parts.data_ptr(), _counters_of_capture(index, stream, counters), parts
    held = _streams.get((index, stream))
    if held is None or held[0] < floats or held[1] < counters:
        held = _enlarge(index, stream, floats, counters)
    return held[2], held[3], None


def _enlarge(index: int, stream: int, floats: int, counters: int) -> tuple[int, int, int, int]:
    """Take more memory, twice as much as before at least: what a launch may still be using is never given back."""
    from tersor.kernels.jit import memory

    with _guard:
        held = _streams.get((index, stream), (0, 0, 0, 0))
        if held[0] < floats or held[1] < counters:
            counters = max(counters, 2 * held[1], _LEAST_COUNTERS)
            floats = max(floats, 2 * held[0], _LEAST_BYTES // 4)
            address = memory.reserve(4 * (counters + floats), index)
            held = _streams[index, stream] = (floats, counters, address, address + 4 * floats)
    return held


def _counters_of_capture(index: int, stream: int, counters: int) -> int:
    from tersor.kernels.jit import memory

    key = (index, stream, _capture_id(stream))
    with _guard:
        held = _captures.get(key, (0, 0))
        if held[0] < counters:
            wanted = max(counters, _LEAST_COUNTERS)
            left, address = _stock.get(index, (0, 0))
            if left < wanted:
                left = max(wanted, _STOCK_COUNTERS)
                address = memory.reserve(4 * left, index)
            _stock[index] = (left - wanted, address + 4 * wanted)
            held = _captures[key] = (wanted, address)
    return held[1]


def _capture_id(stream: int) -> int:
    from cuda.bindings import driver

    result = driver.cuStreamGetCaptureInfo(stream)
    return int(result[2])
