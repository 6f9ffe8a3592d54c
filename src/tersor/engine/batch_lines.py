"""Which requests are in a batch file? OpenAI's format, a JSON object a line, read and checked once before work starts.

A line that is wrong stops nothing: it is kept with its number and the reason. Prompts become tokens on the way, so that
a template that refuses its messages and a prompt longer than the context are found here, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tersor.engine.openai_body import CHAT, URLS, Ask, check_defaults, parse
from tersor.engine.outputs import RequestOutput
from tersor.engine.params import SamplingParams
from tersor.errors import InputError, did_you_mean


class Dialect(Protocol):
    """How the model reads and writes text."""

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the tokens of a text that is a prompt by itself."""

    def chat(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> Sequence[int]:
        """Return the tokens of a chat, ready to be answered.

        Raises:
            InputError: the model's template refuses the messages or has no such option.
        """

    def check(self, url: str, body: Any) -> None:
        """Refuse a body that cannot be meant, whatever it asks for.

        Raises:
            InputError: it is one.
        """

    def params(self, ask: Ask) -> SamplingParams | None:
        """Return how tokens are drawn, with what the model needs beside what was asked for.

        Raises:
            InputError: the model cannot do what was asked for.
        """

    def answer(
        self, ask: Ask, answers: Sequence[RequestOutput], *, name: str, model: str, created: int
    ) -> dict[str, Any]:
        """Return the body that answers a chat or completions: the same whenever it is asked for.

        Args:
            ask: what was asked.
            answers: finished, one a prompt.
            name: of this answer, unique.
            model: its name.
            created: seconds since 1970.
        """


@dataclass(slots=True)
class Line:
    """A request of the file.

    Attributes:
        number: of its line, from 1.
        custom_id: names it, and no other line of the file.
        ask: what it asks for; prompts and messages are left out.
        prompts: int32 [length] each, answered one by one.
        params: of each prompt; `None` of embeddings.
    """

    number: int
    custom_id: str
    ask: Ask
    prompts: list[NDArray[np.int32]]
    params: list[SamplingParams | None]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request.

    Attributes:
        number: of the line, from 1.
        custom_id: where it has one.
        code: what is wrong, in a word.
        message: what is wrong, in a line.
    """

    number: int
    custom_id: str | None
    code: str
    message: str


@dataclass(slots=True)
class BatchInput:
    """What is in a batch file.

    Attributes:
        lines: the requests, in order.
        bad: the lines that are none, in order.
        sha256: of the file.
    """

    lines: list[Line] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    sha256: str = ""


class _LineError(InputError):
    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


def read_batch(
    path: Path, dialect: Dialect, *, models: Collection[str] = (), defaults: Mapping[str, Any] | None = None
) -> BatchInput:
    """Read a batch file in one pass. Empty lines are passed over.

    Args:
        path: of the file.
        dialect: of the model that will answer.
        models: names that a body may give the model; empty allows all.
        defaults: options of sampling that a request has which does not give them.

    Raises:
        InputError: the file cannot be read, or has no line at all; a default is none.
    """
    check_defaults(defaults or {})
    result, digest, seen = BatchInput(), hashlib.sha256(), dict[str, int]()
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                digest.update(raw)
                text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if text.strip():
                    _take(result, number, text, seen, dialect, models, defaults)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if not result.lines and not result.bad:
        raise InputError(f"{path} is empty: a batch has a request in every line")
    result.sha256 = digest.hexdigest()
    return result


def _take(
    result: BatchInput,
    number: int,
    raw: bytes,
    seen: dict[str, int],
    dialect: Dialect,
    models: Collection[str],
    defaults: Mapping[str, Any] | None,
) -> None:
    custom_id = None
    try:
        entry = _object(raw)
        name = entry.get("custom_id")
        custom_id = name if isinstance(name, str) else None
        if not custom_id:
            raise _LineError("invalid_custom_id", "custom_id is missing, empty or no text")
        if custom_id in seen:
            raise _LineError("duplicate_custom_id", f"custom_id {custom_id!r} is that of line {seen[custom_id]}, too")
        seen[custom_id] = number
        url = _url(entry)
        ask = parse(url, entry.get("body"), defaults)
        dialect.check(url, entry["body"])
        params = dialect.params(ask)
        if models and ask.model is not None and ask.model not in models:
            raise _LineError("model_not_found", f"model is {ask.model!r}, and this batch runs {', '.join(models)}")
        result.lines.append(_line(number, custom_id, ask, params, dialect))
    except InputError as error:
        code = error.code if isinstance(error, _LineError) else "invalid_request"
        result.bad.append(BadLine(number, custom_id, code, " ".join(str(error).split())))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(raw.decode(), parse_constant=_no_constant)
        if b"\\ud" in raw.lower():  # a text may hold half a character
            json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _LineError("invalid_json", f"the line is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise _LineError("invalid_json", "the line holds half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise _LineError("invalid_json", f"the line is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise _LineError("invalid_json", "the line is JSON, but no object")
    return entry


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _url(entry: dict[str, Any]) -> str:
    if entry.get("method") != "POST":
        raise _LineError("invalid_method", f"method is {entry.get('method')!r}, expected 'POST'")
    url = entry.get("url")
    if url not in URLS:
        near = did_you_mean(url, URLS) if isinstance(url, str) else ""
        raise _LineError("invalid_url", f"url is {url!r}{near}: use {', '.join(URLS)}")
    return url


def _line(number: int, custom_id: str, ask: Ask, drawn: SamplingParams | None, dialect: Dialect) -> Line:
    if ask.url == CHAT:
        prompts = [np.array(dialect.chat(ask.messages, ask.options), dtype=np.int32)]
    else:
        prompts = [_tokens(prompt, dialect) for prompt in ask.prompts]
    least = 0 if drawn is None else drawn.max_tokens or 1
    for prompt in prompts:
        if not prompt.size:
            raise _LineError("invalid_request", "the prompt has no tokens")
        if prompt.size + least > dialect.context:
            asked = f" and up to {least} are to be drawn" if least else ""
            raise _LineError(
                "context_length_exceeded",
                f"the prompt has {prompt.size} tokens{asked}, and the model's context {dialect.context}",
            )
    params = [_seeded(drawn, f"{custom_id}\0{index}") for index in range(len(prompts))]
    return Line(number, custom_id, replace(ask, prompts=[], messages=[]), prompts, params)


def _tokens(prompt: str | list[int], dialect: Dialect) -> NDArray[np.int32]:
    if isinstance(prompt, str):
        return np.array(dialect.encode(prompt), dtype=np.int32)
    wrong = next((token for token in prompt if not 0 <= token < dialect.vocabulary), None)
    if wrong is not None:
        raise _LineError("invalid_request", f"token {wrong} is none of the model's, 0 to {dialect.vocabulary - 1}")
    return np.array(prompt, dtype=np.int32)


def _seeded(params: SamplingParams | None, name: str) -> SamplingParams | None:
    """Give a request that has no seed one of its name, so that it draws the same text whenever it runs."""
    if params is None or params.greedy or params.seed is not None:
        return params
    return replace(params, seed=int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1)
