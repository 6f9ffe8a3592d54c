"""`/v1/completions`: plain continuations of texts or tokens, as lm-eval asks for them too."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tersor.engine.outputs import CompletionOutput, RequestOutput
from tersor.server.answering import Job
from tersor.server.api import Api
from tersor.server.choice import Choice, News
from tersor.server.errors import ApiError
from tersor.server.events import Plain, Text
from tersor.server.logprobs import PlainEntries
from tersor.server.requests import CompletionRequest
from tersor.server.sse import EventStream, until_gone

_KEYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@dataclass(slots=True)
class _Prompt:
    """One prompt of a request, and its answers."""

    text: str  # as it is echoed
    job: Job
    choices: list[Choice]
    entries: list[PlainEntries] | None  # of each answer, where log probabilities are asked for
    echoed: bool = False
    cached: int = 0


@dataclass(slots=True)
class _Piece:
    """What is new of the answer with an index."""

    index: int
    text: str = ""
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    reason: str | None = None


async def complete(api: Api, request: CompletionRequest, http: Request) -> Response:
    """Continue one or several prompts.

    Raises:
        ApiError: whatever is wrong with the request.
    """
    api.check_model(request.model)
    request.check(api.info.vocabulary)
    given = request.prompts()
    if not given:
        raise ApiError(400, "prompt is an empty list: give a text", param="prompt")
    api.front.check_queue(len(given))
    if request.max_tokens is not None and request.max_tokens < 0:
        raise ApiError(400, f"max_tokens is {request.max_tokens}: it must be at least 0", param="max_tokens")
    prompts = [await api.prompts.run(_prepare, api, request, one) for one in given]
    await api.check_grammar(request.response_format.grammar() if request.response_format else None)
    if request.stream:
        return EventStream(_chunks(api, request, prompts), api.told)
    return JSONResponse(await until_gone(http.receive, _whole(api, request, prompts)))


def _prepare(api: Api, request: CompletionRequest, given: str | list[int]) -> _Prompt:
    """Check a prompt; called in the tokenizer's thread."""
    tokens = api.prompts.checked(given)
    skip = request.skip_special_tokens
    shown = ""
    if request.echo:
        shown = given if isinstance(given, str) else api.prompts.decode(given, skip)
    asked = request.logprobs
    # Where no token is asked for, a step that reads the prompt draws one all the same, which is dropped.
    nothing = request.max_tokens == 0
    room = api.room(len(tokens), None if nothing else request.max_tokens)
    least = {"min_tokens": 0} if nothing else {}
    params = request.params(
        1 if nothing else room, logprobs=asked, prompt_logprobs=asked if request.echo else None, **least
    )
    choices = [Choice(api.info.tokenizer, tokens, Plain(), skip_special=skip) for _ in range(request.n)]
    entries = None
    if asked is not None:
        before: Sequence[int] = () if request.echo else tokens
        entries = [PlainEntries(api.info.tokenizer, before, asked, skip_special=skip) for _ in range(request.n)]
    return _Prompt(shown, Job(tokens, params, request.cache_salt), choices, entries)


async def _pieces(api: Api, request: CompletionRequest, prompts: list[_Prompt]) -> AsyncGenerator[_Piece, None]:
    """Yield what is new of the answers until all have ended."""
    async with api.front.answering([prompt.job for prompt in prompts]) as outputs:
        async for place, output in outputs:
            prompt = prompts[place]
            prompt.cached = output.num_cached_tokens
            if request.echo and not prompt.echoed:
                if prompt.entries is not None and len(output.prompt_logprobs or ()) < len(prompt.job.tokens):
                    continue  # the first answer alone reads them, and another may begin before that
                prompt.echoed = True
                for number in range(request.n):
                    yield _echo(prompt, number, place * request.n + number, output)
            for continuation in output.outputs:
                index = place * request.n + continuation.index
                if request.max_tokens == 0:
                    if not prompt.choices[continuation.index].ended:
                        prompt.choices[continuation.index].ended = True
                        yield _Piece(index, reason="length")
                elif not prompt.choices[continuation.index].ended:
                    yield _piece(prompt, index, continuation)


def _echo(prompt: _Prompt, number: int, index: int, output: RequestOutput) -> _Piece:
    """The prompt itself, as the beginning of an answer."""
    piece = _Piece(index, prompt.text)
    if prompt.entries is not None:
        piece.logprobs = prompt.entries[number].of(prompt.job.tokens, output.prompt_logprobs or [])
    return piece


def _piece(prompt: _Prompt, index: int, continuation: CompletionOutput) -> _Piece:
    news: News = prompt.choices[continuation.index].update(continuation)
    text = "".join(event.text for event in news.events if isinstance(event, Text))
    piece = _Piece(index, text, reason=news.finish_reason)
    if prompt.entries is not None:
        piece.logprobs = prompt.entries[continuation.index].of(news.tokens, news.logprobs)
    return piece


def _usage(api: Api, prompts: list[_Prompt]) -> dict[str, Any]:
    drawn = sum(choice.count for prompt in prompts for choice in prompt.choices)
    return api.usage([len(prompt.job.tokens) for prompt in prompts], drawn, sum(prompt.cached for prompt in prompts))


async def _chunks(api: Api, request: CompletionRequest, prompts: list[_Prompt]) -> AsyncGenerator[dict[str, Any], None]:
    head = api.head("text_completion", "cmpl")
    if request.usage_at_end:
        head["usage"] = None
    async with aclosing(_pieces(api, request, prompts)) as pieces:
        async for piece in pieces:
            logprobs = piece.logprobs if piece.logprobs.get("tokens") else None
            if piece.text or logprobs or piece.reason:
                yield {**head, "choices": [_choice(piece.index, piece.text, logprobs, piece.reason)]}
    usage = _usage(api, prompts)
    if request.usage_at_end:
        yield {**head, "choices": [], "usage": usage}


async def _whole(api: Api, request: CompletionRequest, prompts: list[_Prompt]) -> dict[str, Any]:
    whole = [_Piece(index, logprobs={key: [] for key in _KEYS}) for index in range(len(prompts) * request.n)]
    async with aclosing(_pieces(api, request, prompts)) as pieces:
        async for piece in pieces:
            one = whole[piece.index]
            one.text += piece.text
            one.reason = piece.reason or one.reason
            for key, values in piece.logprobs.items():
                one.logprobs[key] += values
    asked = request.logprobs is not None
    choices = [_choice(one.index, one.text, one.logprobs if asked else None, one.reason) for one in whole]
    return {**api.head("text_completion", "cmpl"), "choices": choices, "usage": _usage(api, prompts)}


def _choice(index: int, text: str, logprobs: dict[str, list[Any]] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
