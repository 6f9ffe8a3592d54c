"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from tersor.server.api import Api
from tersor.server.errors import ApiError
from tersor.server.requests import ChatRequest, Message, Tool


class TokenizeRequest(BaseModel):
    """A text, or a conversation as the chat template writes it."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: list[Message] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(BaseModel):
    """Tokens."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    tokens: list[int]


async def tokenize(api: Api, request: TokenizeRequest) -> dict[str, Any]:
    """Return the tokens of a text or a conversation.

    Raises:
        ApiError: both or neither is given, or the template refuses the conversation.
    """
    api.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if request.messages is not None:
        asked = ChatRequest(messages=request.messages, tools=request.tools or [])
        _, tokens = await api.prompts.run(api.prompts.chat, asked)
    elif request.tools is not None:
        raise ApiError(400, "tools belong to messages", param="tools")
    else:
        tokens = await api.prompts.run(api.prompts.encode, request.prompt, request.add_special_tokens)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": api.info.context}


async def detokenize(api: Api, request: DetokenizeRequest) -> dict[str, Any]:
    """Return the text of tokens, special ones too.

    Raises:
        ApiError: a token that the model does not have.
    """
    api.check_model(request.model)
    if request.tokens:
        await api.prompts.run(api.prompts.checked, request.tokens, "tokens")
    return {"prompt": await api.prompts.run(api.prompts.decode, request.tokens)}
