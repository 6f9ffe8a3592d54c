"""A model of bytes, an engine that answers at random, and the files of a batch job."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.engine.batch_file import Report, run_batch
from tersor.engine.batch_items import BatchEngine, Item
from tersor.engine.openai_body import CHAT, EMBEDDINGS, Ask
from tersor.engine.outputs import Answer, CompletionOutput, EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.errors import InputError


class Letters:
    """A model of bytes: a token is a byte."""

    context = 64
    vocabulary = 256

    def encode(self, text: str) -> Sequence[int]:
        return list(text.encode())

    def chat(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> Sequence[int]:
        if messages[-1]["role"] != "user":
            raise InputError("the last message must be\na user's")
        return [2, *(byte for message in messages for byte in (message["content"] or "").encode()), 3]

    def check(self, url: str, body: Any) -> None:
        if body.get("user") == "nobody":
            raise InputError("nobody asks")

    def params(self, ask: Ask) -> SamplingParams | None:
        return ask.params

    def answer(
        self, ask: Ask, answers: Sequence[RequestOutput], *, name: str, model: str, created: int
    ) -> dict[str, Any]:
        texts = [one.text for output in answers for one in output.outputs]
        if ask.url == CHAT:
            choices = [{"index": i, "message": {"role": "assistant", "content": text}} for i, text in enumerate(texts)]
        else:
            choices = [{"index": i, "text": text} for i, text in enumerate(texts)]
        return {"id": name, "model": model, "created": created, "choices": choices}


class Echo:
    """Answers with tokens of prompt, seed and place, in a random order, `many` at a time."""

    def __init__(self, many: int = 4, seed: int = 0, after: Callable[[int], None] = lambda count: None) -> None:
        self.many, self.after, self.ran = many, after, 0
        self.random = random.Random(seed)

    def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
        waiting, running = list(items)[::-1], list[Item]()
        while True:
            while waiting and len(running) < self.many and not stopping():
                running.append(waiting.pop())
            if not running:
                return
            yield self.answer(running.pop(self.random.randrange(len(running))))
            self.ran += 1
            self.after(self.ran)

    def answer(self, item: Item) -> Answer:
        if item.params is None:
            state = EmbeddingOutput(np.array([item.tokens.sum(), 0.5], np.float32))
            return EmbeddingRequestOutput(item.key, None, item.tokens.tolist(), state)
        if 0 in item.tokens:
            return RequestOutput(item.key, None, item.tokens.tolist(), [CompletionOutput(0)], error="no pages")
        outputs = []
        for index in range(item.params.n):
            draw = random.Random(f"{item.params.seed} {index} {item.tokens.tolist()}")
            tokens = [draw.randrange(97, 123) for _ in range(item.params.max_tokens or 5)]
            outputs.append(CompletionOutput(index, bytes(tokens).decode(), tokens, finish_reason="length"))
        return RequestOutput(item.key, None, item.tokens.tolist(), outputs)


def request(name: str, prompt: Any, **body: Any) -> dict[str, Any]:
    """A line of completions."""
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, **body}}


def write(path: Path, lines: Sequence[Any]) -> Path:
    """Write objects as JSON lines, texts as they are."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Every line of a file, each whole."""
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def go(folder: Path, engine: BatchEngine | None = None, **options: Any) -> Report:
    """Run the job of a folder."""
    known = {"model": "letters", "identity": {"weights": "abc"}, "clock": lambda: 1_700_000_000.5}
    return run_batch(folder / "in.jsonl", folder / "out.jsonl", engine or Echo(), Letters(), **(known | options))


MIXED = [
    *(request(f"q{i}", f"prompt {i}", n=1 + i % 3, max_tokens=1 + i % 7) for i in range(40)),
    "this is not JSON",
    request("q3", "the name is taken"),
    *(request(f"many{i}", [f"part {i}", "b", "c"]) for i in range(5)),
    *(request(f"many{i}", None) | {"url": EMBEDDINGS, "body": {"input": ["a", f"b {i}", "c"]}} for i in range(5, 10)),
    *(request(f"fails{i}", [[0, i]]) for i in range(5)),
    request("streams", "a", stream=True),
]


class Mortal(Echo):
    """Kills its process once, before the file that says so is there."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def run(self, items: Sequence[Item], stopping: Callable[[], bool]) -> Iterator[Answer]:
        for count, answer in enumerate(super().run(items, stopping)):
            if count == 5 and not self.mark.exists():
                self.mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield answer


class MakeMortal:
    """Makes one in another process."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __call__(self, worker: int) -> BatchEngine:
        return Mortal(self.mark)


class MakeSlow:
    """Makes an engine that takes its time."""

    def __call__(self, worker: int) -> BatchEngine:
        return Echo(many=1, after=lambda count: time.sleep(0.01))


class MakeNone:
    """Makes no engine."""

    def __call__(self, worker: int) -> BatchEngine:
        raise InputError(f"no GPU\nfor worker {worker}")


class MakeEcho:
    """Makes the plain engine."""

    def __call__(self, worker: int) -> BatchEngine:
        return Echo()
