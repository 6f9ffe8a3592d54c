"""An engine whose model draws the length of each text, and copies of it in processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tersor.engine.copies import Copies
from tersor.engine.core import Core
from tersor.engine.limits import Limits
from tersor.engine.protocol import ModelInfo
from tersor.engine.request import Step
from tersor.engine.scheduler import Scheduler
from tersor.errors import InputError, KernelError

CONTEXT = 100_000
LAST = 90_000
"""Tokens of an answer that does not end in time."""


@dataclass
class Counting:
    """Draws the length of each text.

    Attributes:
        failing: tokens of a step that fails, or more.
        seconds: that a step takes.
    """

    failing: int = 1 << 30
    seconds: float = 0.0

    @dataclass
    class Launched:
        step: Step
        logprobs: None = field(default=None, init=False)
        prompt_logprobs: None = field(default=None, init=False)
        states: None = field(default=None, init=False)

        def tokens(self) -> list[int]:
            return [row.start + row.count for row in self.step.drawing]

    def launch(self, step: Step, masks: object) -> Launched:
        if step.tokens >= self.failing:
            raise RuntimeError("the device is gone")
        time.sleep(self.seconds)
        return self.Launched(step)


class Letters:
    """A tokenizer whose tokens are letters."""

    all_special_tokens: tuple[str, ...] = ()
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
    bos_token_id = chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "".join(chr(97 + token % 26) for token in tokens)


def core(tokenizer: Any = None, failing: int = 1 << 30, pages: int = 30_000, seconds: float = 0.0) -> Core:
    """Return a core that counts."""
    limits = Limits(pages=pages, page_size=4, context=CONTEXT, max_rows=64, max_step_tokens=256)
    return Core(Scheduler(limits), Counting(failing, seconds), tokenizer)


@dataclass
class Loaded:
    """A model in a process of its own."""

    core: Core
    info: ModelInfo

    def close(self) -> None:
        """Nothing is left."""


@dataclass(frozen=True)
class Load:
    """Loads such a model; see `core` for the options. Copy `broken` raises what `how` names.

    Attributes:
        letters: whether it has a tokenizer.
        late: seconds that loading takes.
    """

    options: dict[str, Any] = field(default_factory=dict)
    broken: int | None = None
    how: str = "usage"
    letters: bool = False
    late: float = 0.0

    def __call__(self, number: int) -> Loaded:
        if number == self.broken:
            raise InputError("there is no\nsuch model") if self.how == "usage" else KernelError("it does not launch")
        time.sleep(self.late)
        info: Any = ModelInfo("counting", CONTEXT, 300, None)  # type: ignore[arg-type]
        return Loaded(core(Letters() if self.letters else None, **self.options), info)


@contextmanager
def copies(said: list[str] | None = None, count: int = 2, restarts: int = 0, **options: Any) -> Iterator[Copies]:
    """Run copies while the block does."""
    say = (lambda line: None) if said is None else said.append
    nobody: Any = lambda: None  # noqa: E731
    found = Copies(Load(options), count, nobody, say=say, restarts=restarts)
    try:
        yield found
    finally:
        found.end()
