"""What does a step under way give, and when? Tokens, and what was asked beside them, on their way to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tersor import ops
from tersor.engine.request import Step
from tersor.ops.collective import Ranks


class Drawn(NamedTuple):
    """What a step gives, on the device.

    Attributes:
        tokens: int64 [rows that draw]; -1 where logits were not finite.
        logprobs: of the tokens drawn, where a row asks for them.
        prompt_logprobs: of tokens of prompts, in the order of rows and of their tokens, where a row asks for them.
        states: float32 [rows of `Step.embedding`, H]: their last states, where there are such rows.
    """

    tokens: torch.Tensor
    logprobs: ops.Logprobs | None = None
    prompt_logprobs: ops.Logprobs | None = None
    states: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Return all that are not empty, in order."""
        some = [one for one in (self.logprobs, self.prompt_logprobs) if one is not None]
        every = [self.tokens, *(x for one in some for x in one), *([] if self.states is None else [self.states])]
        return [x for x in every if x.numel()]


@dataclass(slots=True)
class Launched:
    """A step that is under way.

    Attributes:
        step: which.
        ranks: that computed it.
        arrive: where tokens come from another rank, fetches what was `drawn` of the step.
        found: what was drawn, on the host once `event` has come.
        event: `None` on a CPU.
    """

    step: Step
    ranks: Ranks
    arrive: Callable[[], None] | None = None
    found: Drawn | None = None
    event: torch.cuda.Event | None = None

    def tokens(self) -> list[int]:
        """Wait for the step and return the tokens of its rows that draw; -1 where logits were not finite.

        Raises:
            LostError: a rank is gone.
        """
        if self.arrive is not None:
            self.arrive()
        assert self.found is not None
        if self.event is not None:
            self.event.synchronize()
        self.ranks.check()
        found: list[int] = self.found.tokens.tolist()
        return found

    def publish(self, drawn: Drawn) -> None:
        """Begin to copy what the step gave to the host, on the current stream."""
        if drawn.tokens.device.type != "cuda":
            self.found = drawn._replace(tokens=drawn.tokens.clone())
            return

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return host.copy_(tensor, non_blocking=True)

        self.found = Drawn(
            copied(drawn.tokens),
            None if drawn.logprobs is None else ops.Logprobs(*map(copied, drawn.logprobs)),
            None if drawn.prompt_logprobs is None else ops.Logprobs(*map(copied, drawn.prompt_logprobs)),
            None if drawn.states is None else copied(drawn.states),
        )
        self.event = torch.cuda.Event()
        self.event.record(torch.cuda.current_stream(drawn.tokens.device))

    @property
    def logprobs(self) -> ops.Logprobs | None:
        """Of the tokens drawn, once they are read."""
        return None if self.found is None else self.found.logprobs

    @property
    def prompt_logprobs(self) -> ops.Logprobs | None:
        """Of tokens of prompts, likewise."""
        return None if self.found is None else self.found.prompt_logprobs

    @property
    def states(self) -> torch.Tensor | None:
        """Last states, likewise."""
        return None if self.found is None else self.found.states
