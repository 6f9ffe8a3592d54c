"""A CUDA graph is captured; a capture that fails leaves torch as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """Capture what runs in the context, on the current device, into a graph.

    To torch its random numbers belong to a capture until one ends well: behind a failed one `torch.randn` would raise.

    Args:
        graph: which is captured.
        options: of `torch.cuda.graph`.

    Raises:
        RuntimeError: what ran is forbidden in a capture, or memory ran out.
    """
    try:
        with torch.cuda.graph(graph, **options):
            yield
    except RuntimeError:
        with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="relaxed"):
            torch.zeros(1, device="cuda")
        raise
