"""A step of rows that only decode as a CUDA graph, which reads a buffer of the device and writes the tokens drawn.

Of a stage that is not the first it reads what was passed on, too, and of one that is not the last it writes that. Where
the host has to do something in a step, it is the same step, launched anew every time: `Repeated`.
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
from tersor.ops.capture import beside, capturing


@dataclass(slots=True)
class Captured:
    """A captured step.

    Attributes:
        graph: of it.
        buffer: int32 [layout.size], the step.
        layout: of the buffer.
        made: int64 [layout.rows], the tokens drawn, or [layout.rows, H], the states that are passed on.
        given: [layout.rows, H], what the stage ahead passes on; `None` in the first.
        streamed: brings weights that stream, in the graph too, or `None`.
    """

    graph: torch.cuda.CUDAGraph
    buffer: torch.Tensor
    layout: Layout
    made: torch.Tensor
    given: torch.Tensor | None = None
    streamed: Streamed | None = None

    @property
    def slots(self) -> torch.Tensor:
        """The slots of the step in the buffer, int32 [layout.rows], a view."""
        return _slots(self.layout, self.buffer)

    def replay(self, staged: torch.Tensor) -> torch.Tensor:
        """Run the step in a buffer of the host; return what it made."""
        self.buffer.copy_(staged, non_blocking=True)
        with nullcontext() if self.streamed is None else self.streamed.replayed():
            self.graph.replay()
        return self.made


@dataclass(slots=True)
class Repeated:
    """A step of as many rows as a captured one has, and of the same kernels, so that it draws the same tokens.

    Attributes:
        buffer, layout: as in `Captured`.
        decode: makes of the arrays of a step, its rows and what is given, the tokens drawn.
        given: nothing: weights stream to one stage.
    """

    buffer: torch.Tensor
    layout: Layout
    decode: Callable[[dict[str, torch.Tensor], int, torch.Tensor | None], torch.Tensor]
    given: None = None

    @property
    def slots(self) -> torch.Tensor:
        """The slots of the step in the buffer, int32 [layout.rows], a view."""
        return _slots(self.layout, self.buffer)

    def replay(self, staged: torch.Tensor) -> torch.Tensor:
        """Launch the step in a buffer of the host; return the tokens drawn."""
        self.buffer.copy_(staged, non_blocking=True)
        return self.decode(self.layout.split(self.buffer), self.layout.rows, None)


def _slots(layout: Layout, buffer: torch.Tensor) -> torch.Tensor:
    slots: torch.Tensor = layout.split(buffer)["slots"]
    return slots


def repeated(
    layout: Layout,
    decode: Callable[[dict[str, torch.Tensor], int, torch.Tensor | None], torch.Tensor],
    device: torch.device,
) -> Repeated:
    """Return a step of `layout.rows` rows of one token each that is launched anew each time."""
    return Repeated(torch.zeros(layout.size, dtype=torch.int32, device=device), layout, decode)


def capture(
    layout: Layout,
    decode: Callable[[dict[str, torch.Tensor], int, torch.Tensor | None], torch.Tensor],
    given: torch.Tensor | None = None,
    streamed: Streamed | None = None,
    *,
    spare: int,
    side: torch.cuda.Stream,
    pool: Any,
) -> Captured:
    """Capture a step of `layout.rows` rows of one token each.

    Args:
        layout: of its buffer.
        decode: makes of the arrays of a step, its rows and what is given, the tokens drawn or what is passed on.
        given: memory for what the stage ahead passes on, where there is one.
        streamed: brings weights that stream, or `None`.
        spare: a slot that no request has.
        side: a stream for the forward ahead, in which libraries load and allocate what a capture must not.
        pool: memory of graphs that do not run at once.

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
        with beside(side), nullcontext() if streamed is None else streamed.rehearsed():
            decode(views, size, given)
        with (
            capturing(graph, device, pool=pool),
            nullcontext() if streamed is None else streamed.captured(),
        ):
            made = decode(views, size, given)
    except torch.OutOfMemoryError:
        raise TersorError(f"GPU memory ran out while a step of {size} rows was captured") from None
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise TersorError(f"a step of {size} rows cannot be a CUDA graph: {line}") from error
    return Captured(graph, buffer, layout, made, given, streamed)
