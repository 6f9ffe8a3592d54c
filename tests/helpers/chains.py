"""Launches one upon the other, each of which may start before the one ahead has ended."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tersor import ops


def check_chain(
    chain: Callable[[], torch.Tensor],
    same: Callable[[torch.Tensor, torch.Tensor], bool] = torch.equal,
    times: int = 5,
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Assert that a chain gives what it gives where each launch waits, at once and again and again as a CUDA graph.

    Args:
        chain: launches it.
        same: whether two results are.
        times: how often the graph is replayed, over a result full of NaN.

    Returns:
        The graph, and its result.
    """
    with ops.using(early=False):
        expected = chain()
    assert same(chain(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain()
    for _ in range(times):
        result.fill_(torch.nan)
        graph.replay()
        assert same(result, expected)
    return graph, result
