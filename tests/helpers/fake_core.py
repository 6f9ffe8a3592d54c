"""A core whose model is a function of the text, and runs that audit it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from helpers import tiny_lm
from tersor.engine.core import Core
from tersor.engine.limits import Limits
from tersor.engine.outputs import RequestOutput
from tersor.engine.request import Step
from tersor.engine.scheduler import Scheduler

TOKENIZER = tiny_lm.tokenizer()


def following(text: list[int], index: int = 0) -> int:
    """What this model draws after a text."""
    return random.Random(str((list(text[-3:]), len(text), index))).randrange(20, 400)


@dataclass
class Fake:
    """Draws `following` tokens when it is read, from what is known then."""

    bad: int | None = None

    @dataclass
    class Launched:
        step: Step
        logprobs: None = field(default=None, init=False)
        prompt_logprobs: None = field(default=None, init=False)
        bad: int | None

        @property
        def states(self) -> torch.Tensor | None:
            texts = [self.step.drawing[place].request.prompt for place in self.step.embedding]
            return torch.tensor([[sum(text), len(text)] for text in texts]).float() if texts else None

        def tokens(self) -> list[int]:
            return [
                -1
                if row.start + row.count == self.bad
                else following(row.request.tokens(0, row.start + row.count), row.request.index)
                for row in self.step.drawing
            ]

    def launch(self, step: Step, masks: object) -> Launched:
        return self.Launched(step, self.bad)


def core(pages: int = 50, bad: int | None = None, eos: tuple[int, ...] = (), **limits: int) -> Core:
    return Core(
        Scheduler(
            Limits(**{"pages": pages, "page_size": 4, "context": 60, "max_rows": 8, "max_step_tokens": 16} | limits)
        ),
        Fake(bad),
        TOKENIZER,
        eos,
    )


def run(engine: Core) -> dict[str, RequestOutput]:
    found = {}
    while engine.unfinished:
        for output in engine.step(partial=False):
            assert output.finished and output.request_id not in found
            found[output.request_id] = output
        engine.scheduler.audit()
    return found


def solo(prompt: list[int], count: int, index: int = 0) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(following(text, index))
    return text[len(prompt) :]
