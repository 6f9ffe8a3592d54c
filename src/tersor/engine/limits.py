"""How much may a step and all requests together take?"""

from __future__ import annotations

from dataclasses import dataclass

from tersor.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the scheduler stays within.

    Attributes:
        pages: that there are, page 0 among them, which nobody gets.
        page_size: tokens of a page.
        max_rows: rows of a step, and requests that have pages, at most.
        max_step_tokens: tokens of a step at most; at least `max_rows`, so that all that decode always may.
        max_prompt_logits: tokens of prompts, at most, whose logits a step gives for log probabilities; with one for
            every row that draws, a step never gives more than `max_rows` beside them.
        context: tokens of a text at most.
        share_prefixes: whether requests find pages of other ids; continuations of one prompt always share.
        stages: of the model; as many steps are under way when one is planned (`turns`).
    """

    pages: int
    page_size: int = 64
    max_rows: int = 256
    max_step_tokens: int = 8192
    max_prompt_logits: int = 1024
    context: int
    share_prefixes: bool = True
    stages: int = 1

    def __post_init__(self) -> None:
        if self.pages < 2 or self.page_size < 1:
            raise InputError(f"there are {self.pages} pages of {self.page_size} tokens: at least 2 of 1 are needed")
        if self.context < 2:
            raise InputError(f"the context is {self.context} tokens: a prompt and a token drawn are at least 2")
        if self.max_prompt_logits < 1:
            raise InputError(f"max_prompt_logits is {self.max_prompt_logits}: at least 1 is needed")
        if not 1 <= self.max_rows <= self.max_step_tokens:
            raise InputError(
                f"max_rows is {self.max_rows} and max_step_tokens {self.max_step_tokens}: "
                "at least 1 row, and a token for each, are needed"
            )

    @property
    def storable(self) -> int:
        """Tokens of a text at most: the last one drawn is never stored."""
        return min(self.context, (self.pages - 1) * self.page_size + 1)
