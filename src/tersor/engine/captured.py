"""A step of rows that only decode as a CUDA graph, which reads a buffer of the device and writes the tokens drawn.

Of a stage that is not the first it reads what was passed on, too, and of one that is not the last it writes that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tersor.engine.step_buffer import Layout
from tersor.errors import TersorError
from tersor.ops.capture import capturing


@dataclass(slots=True)
class Captured:
    """A captured step.

    Attributes:
        graph: of it.
        buffer: int32 [layout.size], the step.
        layout: of the buffer.
        made: int64 [layout.rows], the tokens drawn, or [layout.rows, H], the states that are passed on.
        given: [layout.rows, H], what the stage ahead passes on; `None` in the first.
    """

    graph: torch.cuda.CUDAGraph
    buffer: torch.Tensor
    layout: Layout
    made: torch.Tensor
    given: torch.Tensor | None = None

    @property
    def slots(self) -> torch.Tensor:
        """The slots of the step in the buffer, int32 [layout.rows], a view."""
        slots: torch.Tensor = self.layout.split(self.buffer)["slots"]
        return slots

    def replay(self, staged: torch.Tensor) -> torch.Tensor:
        """Run the step in a buffer of the host; return what it made."""
        self.buffer.copy_(staged, non_blocking=True)
        self.graph.replay()
        return self.made


def capture(
    layout: Layout,
    decode: Callable[[dict[str, torch.Tensor], int, torch.Tensor | None], torch.Tensor],
    given: torch.Tensor | None = None,
    *,
    spare: int,
    side: torch.cuda.Stream,
    pool: Any,
    mode: str,
) -> Captured:
    """Capture a step of `layout.rows` rows of one token each.

    Args:
        layout: of its buffer.
        decode: makes of the arrays of a step, its rows and what is given, the tokens drawn or what is passed on.
        given: memory for what the stage ahead passes on, where there is one.
        spare: a slot that no request has.
        side: a stream for the forward ahead, in which libraries load and allocate what a capture must not.
        pool: memory of graphs that do not run at once.
        mode: what others may call meanwhile, as torch has it.

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
        with torch.cuda.stream(side):
            decode(views, size, given)
        torch.cuda.current_stream(device).wait_stream(side)
        with capturing(graph, pool=pool, capture_error_mode=mode):
            made = decode(views, size, given)
    except torch.OutOfMemoryError:
        raise TersorError(f"GPU memory ran out while a step of {size} rows was captured") from None
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise TersorError(f"a step of {size} rows cannot be a CUDA graph: {line}") from error
    return Captured(graph, buffer, layout, made, given)
