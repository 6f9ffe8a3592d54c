"""`/v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tersor.server.answering import Job
from tersor.server.api import Api
from tersor.server.choice import Choice, News
from tersor.server.errors import ApiError
from tersor.server.events import Arguments, CallBegins, CallFailed, Event, Reasoning, Text
from tersor.server.logprobs import chat_entries
from tersor.server.requests import ChatRequest, NamedTool
from tersor.server.sse import EventStream, until_gone


@dataclass(slots=True)
class _Chat:
    """A request that passed every check."""

    request: ChatRequest
    job: Job
    choices: list[Choice]
    top: int  # most probable tokens shown
    cached: int = 0


async def chat(api: Api, request: ChatRequest, http: Request) -> Response:
    """Answer a conversation.

    Raises:
        ApiError: whatever is wrong with the request.
    """
    one = await _prepare(api, request)
    if request.stream:
        return EventStream(_chunks(api, one), api.told)
    return JSONResponse(await until_gone(http.receive, _whole(api, one)))


async def _prepare(api: Api, request: ChatRequest) -> _Chat:
    api.check_model(request.model)
    api.front.check_queue()
    request.check(api.info.vocabulary)
    text, tokens = await api.prompts.run(api.prompts.chat, request)
    parsers = api.parsers
    names = [tool.function.name for tool in request.tools] if request.tool_choice != "none" else []
    if names and not request.forced and parsers.tools == "none":
        raise ApiError(400, "no parser for this model's tool calls: start the server with --tool-parser", param="tools")
    by_name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    wanted = getattr(request, by_name)
    if wanted is not None and wanted < 1:
        raise ApiError(400, f"{by_name} is {wanted}: it must be at least 1", param=by_name)
    top = request.top_logprobs or 0
    others: dict[str, Any] = {"logprobs": top if request.logprobs else None}
    if request.forced:
        others["grammar"] = forced_grammar(request)
    elif parsers.reasoning != "none":
        others["stop"] = ()  # the parser looks for them, outside the reasoning
    if parsers.special and (names or parsers.reasoning != "none") and not request.forced:
        others["skip_special_tokens"] = False
    params = request.params(api.room(len(tokens), wanted, by_name), **others)
    await api.check_grammar(params.grammar, "tool_choice" if request.forced else "response_format")
    forced = None
    if request.forced:
        forced = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else ""
    choices = []
    for _ in range(request.n):
        parser, watch = parsers.chain(text, names, forced, request.stops, request.include_stop_str_in_output)
        choices.append(
            Choice(
                api.info.tokenizer,
                tokens,
                parser,
                watch,
                one_call=bool(names) and not request.parallel_tool_calls,
                skip_special=params.skip_special_tokens,
            )
        )
    return _Chat(request, Job(tokens, params, request.cache_salt), choices, top)


def forced_grammar(request: ChatRequest) -> dict[str, Any]:
    """The schema of arguments of the function that must be called, or of a list of calls of any of them."""
    if isinstance(request.tool_choice, NamedTool):
        wanted = request.tool_choice.function.name
        return {"json_schema": next(one.function.parameters for one in request.tools if one.function.name == wanted)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": one.function.name}, "parameters": one.function.parameters},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for one in request.tools
    ]
    most = {} if request.parallel_tool_calls else {"maxItems": 1}
    return {"json_schema": {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}}}


async def _news(api: Api, one: _Chat) -> AsyncGenerator[tuple[int, News], None]:
    """Yield (choice, what is new of it) until all have ended."""
    async with api.front.answering([one.job]) as outputs:
        async for _, output in outputs:
            one.cached = output.num_cached_tokens
            for continuation in output.outputs:
                choice = one.choices[continuation.index]
                if not choice.ended:
                    yield continuation.index, choice.update(continuation)
            if all(choice.ended for choice in one.choices):
                return


def _usage(api: Api, one: _Chat) -> dict[str, Any]:
    return api.usage([len(one.job.tokens)], sum(choice.count for choice in one.choices), one.cached)


async def _chunks(api: Api, one: _Chat) -> AsyncGenerator[dict[str, Any], None]:
    head = api.head("chat.completion.chunk", "chatcmpl")
    if one.request.usage_at_end:
        head["usage"] = None
    greeted: set[int] = set()
    ids: dict[tuple[int, int], str] = {}

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}

    async with aclosing(_news(api, one)) as grows:
        async for index, news in grows:
            if index not in greeted:
                greeted.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            deltas = [_delta(event, index, ids) for event in news.events]
            logprobs = _logprobs(api, one, news)
            if logprobs is not None and not deltas:
                deltas = [{"content": ""}]
            for delta in deltas:
                yield chunk(index, delta, logprobs)
                logprobs = None  # each token's are shown once
            if news.finish_reason is not None:
                yield chunk(index, {}, None, news.finish_reason)
    usage = _usage(api, one)
    if one.request.usage_at_end:
        yield {**head, "choices": [], "usage": usage}


def _delta(event: Event, index: int, ids: dict[tuple[int, int], str]) -> dict[str, Any]:
    """What an event adds to a message."""
    if isinstance(event, Text):
        return {"content": event.text}
    if isinstance(event, Reasoning):
        return {"reasoning_content": event.text}
    if isinstance(event, CallFailed):
        return {"content": event.rest}
    if isinstance(event, Arguments):
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
    call = ids[index, event.index] = _call_id()
    function = {"name": event.name, "arguments": ""}
    return {"tool_calls": [{"index": event.index, "id": call, "type": "function", "function": function}]}


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _logprobs(api: Api, one: _Chat, news: News) -> dict[str, Any] | None:
    if not one.request.logprobs or not news.tokens:
        return None
    return {"content": chat_entries(news.tokens, news.logprobs, one.top, api.bytes_of), "refusal": None}


async def _whole(api: Api, one: _Chat) -> dict[str, Any]:
    messages = [WholeMessage() for _ in one.choices]
    async with aclosing(_news(api, one)) as grows:
        async for index, news in grows:
            messages[index].add(news)
            if found := _logprobs(api, one, news):
                messages[index].entries += found["content"]
    choices = [
        {
            "index": index,
            "message": message.body(),
            "logprobs": {"content": message.entries, "refusal": None} if one.request.logprobs else None,
            "finish_reason": message.reason,
        }
        for index, message in enumerate(messages)
    ]
    return {**api.head("chat.completion", "chatcmpl"), "choices": choices, "usage": _usage(api, one)}


class WholeMessage:
    """A message that is told whole: its pieces put together."""

    def __init__(self) -> None:
        self.text = self.reasoning = ""
        self.calls: dict[int, dict[str, str]] = {}
        self.entries: list[dict[str, Any]] = []
        self.reason: str | None = None

    def add(self, news: News) -> None:
        """Add what is new; a call that was none is text."""
        for event in news.events:
            if isinstance(event, Text):
                self.text += event.text
            elif isinstance(event, Reasoning):
                self.reasoning += event.text
            elif isinstance(event, CallBegins):
                self.calls[event.index] = {"name": event.name, "arguments": ""}
            elif isinstance(event, Arguments):
                self.calls[event.index]["arguments"] += event.text
            else:
                del self.calls[event.index]
                self.text += event.raw
        self.reason = news.finish_reason or self.reason

    def body(self) -> dict[str, Any]:
        """Return it in OpenAI's shape; `reasoning_content` and `tool_calls` are there where the model wrote some."""
        text = None if self.calls and not self.text else self.text
        body: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.reasoning:
            body["reasoning_content"] = self.reasoning
        if self.calls:
            body["tool_calls"] = [
                {"id": _call_id(), "type": "function", "function": self.calls[index]} for index in sorted(self.calls)
            ]
        return body
