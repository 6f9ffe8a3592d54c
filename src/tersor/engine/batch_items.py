"""What does a batch want of an engine? Prompts in, finished outputs in any order; equal questions are asked once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tersor.engine.outputs import Answer, EmbeddingRequestOutput, RequestOutput
from tersor.engine.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt to be answered.

    Attributes:
        key: becomes the `request_id` of its output.
        tokens: int32 [length].
        params: how tokens are drawn, with a seed where they are; `None` asks for the last state instead.
    """

    key: str
    tokens: NDArray[np.int32]
    params: SamplingParams | None

    @property
    def rows(self) -> int:
        """Rows that it takes in an engine: one a continuation."""
        return 1 if self.params is None else self.params.n

    def answer(self, output: RequestOutput) -> Answer:
        """Return what an engine told of it as what it asks for."""
        return EmbeddingRequestOutput.of(output) if self.params is None else output


class BatchEngine(Protocol):
    """What answers the prompts of a batch."""

    def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterable[Answer]:
        """Yield the finished output of every item, in any order; one that fails says so in `error`.

        Once `stopping()` is true no further item is begun: what runs is finished, and the rest has no output.
        """


_PLAIN = attrgetter(
    *(one.name for one in fields(SamplingParams) if one.name not in ("seed", "logit_bias", "grammar", "temperature"))
)
"""Fields of greedy sampling that matter and can be shown as they are."""


def question(item: Item) -> bytes | None:
    """Return what items of one answer have in common; `None` where chance has a part in it."""
    params, digest = item.params, hashlib.sha256()
    if params is not None:
        if not params.greedy:
            return None
        bias = sorted(params.logit_bias.items())
        digest.update(repr((_PLAIN(params), bias, json.dumps(params.grammar, sort_keys=True))).encode())
    digest.update(item.tokens.tobytes())
    return digest.digest()


def answer_once(engine: BatchEngine, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
    """Yield the outputs of all items as `BatchEngine.run` does, where a question that is asked twice is run once.

    Equal prompts have one answer where it is greedy, or the last state.
    """
    first: dict[bytes, str] = {}
    runs: list[Item] = []
    others: dict[str, list[str]] = {}
    for item in items:
        key = question(item)
        name = item.key if key is None else first.setdefault(key, item.key)
        if name == item.key:
            runs.append(item)
        else:
            others.setdefault(name, []).append(item.key)
    for answer in engine.run(runs, stopping):
        yield answer
        for name in others.pop(answer.request_id, ()):
            yield replace(answer, request_id=name)
