"""How long does a call take on a GPU? A CUDA graph that walks over copies of the weight, so that none stays in L2."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from tersor.ops.capture import beside, capturing

WARM_SECONDS = 0.02
"""Replays before a graph is timed."""


def graph_microseconds(calls: Sequence[Callable[[], object]], replays: int = 9) -> float:
    """Return the median time of one call, in microseconds.

    All `calls` are captured into one graph, each on its own data; together they should touch several times the L2
    cache (0.7 GB is enough on an H200). The graph is replayed for `WARM_SECONDS` before it is timed: an idle GPU takes
    as long to raise its clocks, and what is timed first after weights were made came out up to 20 % slow on an H200.

    Args:
        calls: what is timed; run once before capture.
        replays: timed replays of the whole graph.
    """
    with beside(_side_stream(torch.cuda.current_device())):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, torch.device("cuda")):
        for call in calls:
            call()
    warm = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < warm:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Return one stream a device for what runs before a capture: kernels keep their workspace for every stream."""
    return torch.cuda.Stream(device)


def read_bandwidth() -> float:
    """Return the bandwidth of a large read, in bytes per second: a float32 sum over 4 GB."""
    data = torch.randn(1 << 30, device="cuda")
    microseconds = graph_microseconds([lambda: torch.sum(data)], replays=5)
    return data.nbytes / microseconds * 1e6


def copies(nbytes: int, total: int = 700 << 20) -> int:
    """Return how many copies of a weight of `nbytes` keep any of them from staying in L2."""
    return max(2, -(-total // nbytes))
