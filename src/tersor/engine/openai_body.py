"""What does the body of a request of OpenAI's API ask for? Checked field by field, nothing left out in silence.

Fields are those of the API (chat completions, completions, embeddings), and beside them those of `SamplingParams` that
it lacks. `null` is a field that is not there. A field that is not known is an error, since an option without an effect
would be a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tersor.engine.params import SamplingParams
from tersor.errors import InputError, did_you_mean

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
URLS = (CHAT, COMPLETIONS, EMBEDDINGS)

Tokens = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a body asks for.

    Attributes:
        url: one of `URLS`.
        model: as the body names it, or `None`.
        messages: of a chat, each content a text or `None`; else empty.
        prompts: of completions and embeddings, texts or tokens, answered one by one; else empty.
        params: how tokens are drawn; `None` for embeddings.
        options: what a chat template and who reads its answer look at: tools, tool_choice, parallel_tool_calls,
            reasoning_effort, and the names of chat_template_kwargs.
        base64: whether embeddings are wanted as base64 of little-endian float32.
    """

    url: str
    model: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[str | Tokens] = field(default_factory=list)
    params: SamplingParams | None = None
    options: dict[str, Any] = field(default_factory=dict)
    base64: bool = False


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Check options that requests have which do not give them.

    Raises:
        InputError: one is no field of sampling, of a wrong type or out of its range.
    """
    for name, value in defaults.items():
        if name not in _SAMPLING:
            raise InputError(f"{name!r} is no option of sampling{did_you_mean(name, _SAMPLING)}")
        _SAMPLING[name].check(name, value)
    SamplingParams(**defaults)


def parse(url: str, body: Any, defaults: Mapping[str, Any] | None = None) -> Ask:
    """Return what a body asks for.

    Args:
        url: one of `URLS`.
        body: as it was read from JSON.
        defaults: fields of sampling that a body has which does not give them.

    Raises:
        InputError: a field is missing, unknown, of a wrong type or out of its range.
    """
    if not isinstance(body, dict):
        raise InputError(f"body is {_kind(body)}, expected an object")
    given = {name: value for name, value in body.items() if value is not None}
    fields = _FIELDS[url]
    for name, value in given.items():
        if name in _LACKING:
            if value != _LACKING[name]:
                raise InputError(f"{name} is not supported: leave it out")
        elif name not in fields:
            raise InputError(f"body has a field {name!r} that is not known here{did_you_mean(name, fields)}")
        else:
            fields[name].check(name, value)
    required = {CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input"}[url]
    if required not in given:
        raise InputError(f"body has no {required}")
    model = given.get("model")
    if url == EMBEDDINGS:
        return Ask(
            url=url,
            model=model,
            prompts=_prompts("input", given["input"]),
            base64=given.get("encoding_format") == "base64",
        )
    params = _params(url, {**(defaults or {}), **given})
    if url == COMPLETIONS:
        return Ask(url=url, model=model, prompts=_prompts("prompt", given["prompt"]), params=params)
    options = {name: given[name] for name in _OPTIONS if name in given} | given.get("chat_template_kwargs", {})
    return Ask(url=url, model=model, messages=_messages(given["messages"]), params=params, options=options)


def _params(url: str, given: dict[str, Any]) -> SamplingParams:
    chosen = {name: given[name] for name in _SAMPLING if name in given}
    if "max_completion_tokens" in given:
        chosen["max_tokens"] = given["max_completion_tokens"]
    if "logit_bias" in given:
        chosen["logit_bias"] = {_token(name): bias for name, bias in given["logit_bias"].items()}
    if url == CHAT:
        if given.get("top_logprobs") is not None and not given.get("logprobs"):
            raise InputError("top_logprobs is given without logprobs: true")
        if given.get("logprobs"):
            chosen["logprobs"] = given.get("top_logprobs", 0)
    elif "logprobs" in given:
        chosen["logprobs"] = given["logprobs"]
    grammar = _grammar(given)
    if grammar is not None:
        chosen["grammar"] = grammar
    return SamplingParams(**chosen)


_MOST_DIGITS = 10
"""Of a token's number."""


def _token(name: str) -> int:
    if not name.isdecimal() or len(name) > _MOST_DIGITS:
        raise InputError(f"logit_bias names a token {name[:20]!r}, expected its number")
    return int(name)


def _grammar(given: dict[str, Any]) -> dict[str, Any] | None:
    wanted = given.get("response_format", {"type": "text"})
    form = wanted.get("type")
    if form == "text":
        return None
    if form == "json_object":
        return {"json_object": True}
    if form == "json_schema":
        schema = wanted.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise InputError("response_format has no json_schema with a schema")
        return {"json_schema": schema["schema"]}
    raise InputError(f"response_format has type {form!r}: use text, json_object or json_schema")


def _messages(messages: list[Any]) -> list[dict[str, Any]]:
    if not messages:
        raise InputError("messages is empty")
    result = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise InputError(f"{where} is {_kind(message)}, expected an object")
        if not isinstance(message.get("role"), str):
            raise InputError(f"{where} has no role")
        result.append({**message, "content": _content(where, message.get("content"))})
    return result


def _content(where: str, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where} has a content that is {_kind(content)}, expected a text or a list of parts")
    texts = []
    for part in content:
        form = part.get("type") if isinstance(part, dict) else _kind(part)
        if form != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where} has a part of type {form!r}: only text is read")
        texts.append(part["text"])
    return "".join(texts)


def _prompts(name: str, given: Any) -> list[str | Tokens]:
    many = isinstance(given, list) and bool(given) and not _is_int(given[0])
    prompts = given if many else [given]
    for prompt in prompts:
        tokens = isinstance(prompt, list) and all(map(_is_int, prompt))
        if not tokens and not isinstance(prompt, str):
            raise InputError(f"{name} holds {_kind(prompt)}: it must be a text, tokens, or a list of one of them")
        if not prompt:
            raise InputError(f"{name} is empty")
    return prompts


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _kind(value: Any) -> str:
    """What JSON calls the type of a value."""
    if value is None:
        return "null"
    for types, name in ((bool, "a boolean"), (int | float, "a number"), (str, "a text"), (list, "a list")):
        if isinstance(value, types):
            return name
    return "an object"


@dataclass(frozen=True, slots=True)
class _Field:
    legal: Callable[[Any], bool]
    expected: str

    def check(self, name: str, value: Any) -> None:
        if not self.legal(value):
            shown = f" ({value})" if _is_number(value) or (isinstance(value, str) and len(value) <= 20) else ""
            raise InputError(f"{name} is {_kind(value)}{shown}, expected {self.expected}")


_INT = _Field(_is_int, "a whole number")
_NUMBER = _Field(_is_number, "a number")
_BOOL = _Field(lambda value: isinstance(value, bool), "true or false")
_TEXT = _Field(lambda value: isinstance(value, str), "a text")
_LIST = _Field(lambda value: isinstance(value, list), "a list")
_OBJECT = _Field(lambda value: isinstance(value, dict), "an object")
_ANY = _Field(lambda value: True, "")

_SAMPLING: dict[str, _Field] = {
    "n": _INT,
    "max_tokens": _INT,
    "min_tokens": _INT,
    "temperature": _NUMBER,
    "top_k": _INT,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "seed": _INT,
    "stop": _Field(_is_texts, "a text or a list of texts"),
    "stop_token_ids": _Field(lambda value: isinstance(value, list) and all(map(_is_int, value)), "a list of tokens"),
    "include_stop_str_in_output": _BOOL,
    "ignore_eos": _BOOL,
    "skip_special_tokens": _BOOL,
}
"""Fields that are called the same in `SamplingParams`."""

_DRAWN: Mapping[str, _Field] = {
    **_SAMPLING,
    "logit_bias": _Field(
        lambda value: isinstance(value, dict) and all(map(_is_number, value.values())), "token: number"
    ),
    "response_format": _OBJECT,
}

_SERVICE: Mapping[str, _Field] = dict.fromkeys(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "cache_salt",
    ),
    _ANY,
)
"""Fields about a service and what it keeps, which say nothing about the answer."""

_OPTIONS: Mapping[str, _Field] = {
    "tools": _LIST,
    "tool_choice": _Field(lambda value: isinstance(value, str | dict), "a text or an object"),
    "parallel_tool_calls": _BOOL,
    "reasoning_effort": _TEXT,
}

_LACKING: Mapping[str, Any] = {
    "stream": False,
    "echo": False,
    "best_of": 1,
    "suffix": "",
    "modalities": ["text"],
    "dimensions": None,  # a state that is cut means nothing, but of models that were taught so
}
"""Fields that only may say what is so without them."""

_FIELDS: Mapping[str, Mapping[str, _Field]] = {
    CHAT: {
        "model": _TEXT,
        "messages": _LIST,
        **_DRAWN,
        "max_completion_tokens": _INT,
        "logprobs": _BOOL,
        "top_logprobs": _INT,
        **_OPTIONS,
        "chat_template_kwargs": _OBJECT,
        **_SERVICE,
    },
    COMPLETIONS: {"model": _TEXT, "prompt": _ANY, **_DRAWN, "logprobs": _INT, **_SERVICE},
    EMBEDDINGS: {
        "model": _TEXT,
        "input": _ANY,
        "encoding_format": _Field(lambda value: value in ("float", "base64"), "float or base64"),
        **_SERVICE,
    },
}
