"""A step of rows that only decode as a CUDA graph, which reads a buffer of the device and writes the tokens drawn.

Where the host has to do something in a step, it is the same step, launched anew every time: `Repeated`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tersor.engine.step_buffer import Layout
from tersor.errors import TersorError
from tersor.models.streamed import Streamed
from tersor.ops.capture import capturing


@dataclass(slots=True)
class Captured:
    """A captured step.

    Attributes:
        graph: of it.
        buffer: int32 [layout.size], the step.
        layout: of the buffer.
        drawn: int64 [layout.rows], the tokens drawn.
        streamed: brings weights that stream, in the graph too, or `None`.
    """

    graph: torch.cuda.CUDAGraph
    buffer: torch.Tensor
    layout: Layout
    drawn: torch.Tensor
    streamed: Streamed | None = None

    def replay(self, staged: torch.Tensor) -> torch.Tensor:
        """Run the step in a buffer of the host; return the tokens drawn."""
        self.buffer.copy_(staged, non_blocking=True)
        with nullcontext() if self.streamed is None else self.streamed.replayed():
            self.graph.replay()
        return self.drawn


@dataclass(slots=True)
class Repeated:
    """A step of as many rows as a captured one has, and of the same kernels, so that it draws the same tokens.

    Attributes:
        buffer, layout: as in `Captured`.
        decode: makes of the arrays of a step, and its rows, the tokens drawn.
    """

    buffer: torch.Tensor
    layout: Layout
    decode: Callable[[dict[str, torch.Tensor], int], torch.Tensor]

    def replay(self, staged: torch.Tensor) -> torch.Tensor:
        """Launch the step in a buffer of the host; return the tokens drawn."""
        self.buffer.copy_(staged, non_blocking=True)
        return self.decode(self.layout.split(self.buffer), self.layout.rows)


def repeated(
    layout: Layout, decode: Callable[[dict[str, torch.Tensor], int], torch.Tensor], device: torch.device
) -> Repeated:
    """Return a step of `layout.rows` rows of one token each that is launched anew each time."""
    return Repeated(torch.zeros(layout.size, dtype=torch.int32, device=device), layout, decode)


def capture(
    layout: Layout,
    decode: Callable[[dict[str, torch.Tensor], int], torch.Tensor],
    *,
    spare: int,
    side: torch.cuda.Stream,
    pool: Any,
    mode: str,
    streamed: Streamed | None = None,
) -> Captured:
    """Capture a step of `layout.rows` rows of one token each.

    Args:
        layout: of its buffer.
        decode: makes of the arrays of a step, and its rows, the tokens drawn.
        spare: a slot that no request has.
        side: a stream for the forward ahead, in which libraries load and allocate what a capture must not.
        pool: memory of graphs that do not run at once.
        mode: what others may call meanwhile, as torch has it.
        streamed: brings weights that stream, or `None`.

    Raises:
        TersorError: the model does what a capture forbids, or memory ran out.
    """
    size, device = layout.rows, side.device
    buffer = torch.zeros(layout.size, dtype=torch.int32, device=device)
    views = layout.split(buffer)
    views["starts"].copy_(torch.arange(size + 1))
    views["places"].copy_(torch.arange(size))
    views["slots"].fill_(spare)
    graph = torch.cuda.CUDAGraph()
    try:
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side), nullcontext() if streamed is None else streamed.rehearsed():
            decode(views, size)
        torch.cuda.current_stream(device).wait_stream(side)
        with (
            capturing(graph, pool=pool, capture_error_mode=mode),
            nullcontext() if streamed is None else streamed.captured(),
        ):
            drawn = decode(views, size)
    except torch.OutOfMemoryError:
        raise TersorError(f"GPU memory ran out while a step of {size} rows was captured") from None
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise TersorError(f"a step of {size} rows cannot be a CUDA graph: {line}") from error
    return Captured(graph, buffer, layout, drawn, streamed)
