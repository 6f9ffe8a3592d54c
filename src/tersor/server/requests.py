"""What may a client send? The bodies of requests, every field named; what is not named here is refused by its name.

Fields of OpenAI's API that change no answer (`user`, `metadata`, `store`) are taken and left alone. A null field
counts as one that is not there. Beyond OpenAI's there are options of `SamplingParams` and what chat templates take.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tersor.engine.params import MOST_LOGPROBS, SamplingParams
from tersor.server.errors import ApiError

MOST_CHOICES = 128
"""Largest `n`."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = False


class JsonSchema(_Body):
    """A schema that an answer is held to, and its name."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool = True


class ResponseFormat(_Body):
    """What an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> dict[str, Any] | None:
        """Return it as a grammar of `SamplingParams`.

        Raises:
            ApiError: a schema is named and not given.
        """
        if self.type == "json_object":
            return {"json_object": True}
        if self.type == "text":
            return None
        if self.json_schema is None:
            raise ApiError(400, "response_format.json_schema is missing: give a schema", param="response_format")
        return {"json_schema": self.json_schema.schema_}


class Asking(_Body):
    """What all requests share: which model, who may find what was read, and what changes no answer."""

    model: str | None = None
    cache_salt: str | None = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class Drawing(Asking):
    """What chat and plain completions share."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = Field(default_factory=dict)
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int = 0
    stop_token_ids: list[int] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with a chunk that says what it took."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, vocabulary: int) -> None:
        """Refuse what cannot be meant.

        Raises:
            ApiError: options of a stream without one, an empty stop text, or tokens that the model does not have.
        """
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is given and stream is not true", param="stream_options")
        if not all(self.stops):
            raise ApiError(400, "a stop text is empty: it would end every answer at once", param="stop")
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(self, name):
                if not 0 <= token < vocabulary:
                    raise ApiError(400, f"{name} holds token {token}, the model has {vocabulary}", param=name)

    def params(self, max_tokens: int, **others: Any) -> SamplingParams:
        """Return how to draw; `others` are fields that only one kind of request has.

        Raises:
            InputError: a value out of its range.
        """
        fields: dict[str, Any] = {
            "n": self.n,
            "max_tokens": max_tokens,
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "seed": self.seed,
            "stop": self.stops,
            "stop_token_ids": tuple(self.stop_token_ids),
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
            "grammar": self.response_format.grammar() if self.response_format else None,
        }
        return SamplingParams(**{**fields, **others})


Given: TypeAlias = str | list[int] | list[str] | list[list[int]]
"""A text or tokens, or a list of either."""


def _listed(given: Given) -> list[str] | list[list[int]]:
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [given]  # type: ignore[list-item]
    return given  # type: ignore[return-value]


class CompletionRequest(Drawing):
    """Body of `/v1/completions`."""

    prompt: Given
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts as a list."""
        return _listed(self.prompt)

    def check(self, vocabulary: int) -> None:
        """As for all, and `best_of` must be `n`: nothing is drawn only to be thrown away."""
        super().check(vocabulary)
        if self.best_of not in (None, self.n):
            raise ApiError(400, f"best_of is {self.best_of}: only n, {self.n}, is supported", param="best_of")


class EmbeddingRequest(Asking):
    """Body of `/v1/embeddings`."""

    input: Given
    encoding_format: Literal["float", "base64"] = "float"

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the inputs as a list.

        Raises:
            ApiError: there is none, or one is empty.
        """
        found = _listed(self.input)
        if not found or not all(found):
            raise ApiError(400, "input is empty: give a text or tokens", param="input")
        return found


class FunctionCall(_Body):
    """A function that was called; arguments are JSON."""

    name: str
    arguments: str = "{}"


class ToolCall(_Body):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"] = "function"
    index: int | None = None
    function: FunctionCall


class Part(BaseModel):
    """A part of a message. Only texts are read."""

    type: str
    text: str | None = None


class Message(_Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)

    def text(self, index: int) -> str | None:
        """Return the content as one text.

        Raises:
            ApiError: a part that is no text; `index` says in which message.
        """
        if not isinstance(self.content, list):
            return self.content
        for part in self.content:
            if part.type != "text" or part.text is None:
                kind = f"messages.{index}.content holds a part of type {part.type!r}"
                raise ApiError(400, f"{kind}: the model reads text", param="messages")
        return "".join(part.text or "" for part in self.content)


class Function(_Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


class Tool(_Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Body):
    """The name of a function."""

    name: str


class NamedTool(_Body):
    """The tool that must be used."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Drawing):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def check(self, vocabulary: int) -> None:
        """As for all, and options of tools need tools, those of log probabilities `logprobs`."""
        super().check(vocabulary)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs is given and logprobs is not true", param="top_logprobs")
        names = [tool.function.name for tool in self.tools]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            wanted = self.tool_choice.function.name
            raise ApiError(400, f"tool_choice names {wanted!r}, which is not among the tools", param="tool_choice")
        if self.tool_choice == "required" and not names:
            raise ApiError(400, "tool_choice is required and there are no tools", param="tool_choice")
        for index, tool in enumerate(self.tools):
            if tool.function.strict and self.tool_choice == "auto":
                message = f"tools.{index}.function.strict holds only where tool_choice names a tool or is required"
                raise ApiError(400, f"{message}: leave it out", param="tools", code="unsupported_parameter")
        if self.response_format is not None and self.forced and self.response_format.type != "text":
            raise ApiError(400, "response_format and a tool_choice that forces a call exclude each other")

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice not in ("none", "auto")
