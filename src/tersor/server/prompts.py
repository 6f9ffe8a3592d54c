"""From messages to tokens: the chat template, with what users write kept apart from what the template writes."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from tersor.server.errors import ApiError
from tersor.server.requests import ChatRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class Prompts:
    """Encodes prompts, one at a time and off the event loop, since a tokenizer has state."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._thread = ThreadPoolExecutor(1, "tersor-tokenizer")
        special = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        self.template = _template_text(tokenizer)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function of this class in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the tokens of a plain prompt, with what the tokenizer puts before one if `special`."""
        return [int(token) for token in self._tokenizer(text, add_special_tokens=special)["input_ids"]]

    def decode(self, tokens: list[int], skip_special: bool = False) -> str:
        """Return the text of tokens."""
        text = self._tokenizer.decode(tokens, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return str(text)

    def checked(self, prompt: str | list[int], name: str = "prompt") -> list[int]:
        """Return the tokens of a prompt that is text or tokens.

        Raises:
            ApiError: it is empty, or holds a token that the model does not have.
        """
        tokens = self.encode(prompt) if isinstance(prompt, str) else prompt
        if not tokens and self._tokenizer.bos_token_id is not None:
            tokens = [int(self._tokenizer.bos_token_id)]  # the one text that an empty prompt can mean
        if not tokens:
            raise ApiError(400, f"{name} is empty and the model has no token to begin with: give a text", param=name)
        for token in (min(tokens), max(tokens)):
            if not 0 <= token < self._vocabulary:
                raise ApiError(400, f"{name} holds token {token}, the model has {self._vocabulary}", param=name)
        return tokens

    def chat(self, request: ChatRequest) -> tuple[str, list[int]]:
        """Return a conversation as the chat template writes it, as text and as tokens.

        The template writes its own special tokens, so none is put before it; the text of one in a message, a tool or
        a template variable stays text.

        Raises:
            ApiError: the model has no template, or the template refuses the conversation, with its own words.
        """
        if self.template is None:
            raise ApiError(400, "the model has no chat template: ask /v1/completions", code="no_chat_template")
        mark = f"mark{secrets.token_hex(12)}"
        variables = self._variables(request)
        try:
            text = self._tokenizer.apply_chat_template(
                self._inert(self._messages(request), mark),
                tokenize=False,
                add_generation_prompt=True,
                **self._inert(variables, mark),
            )
        except Exception as error:  # a template raises what it likes
            raise ApiError(400, f"chat template: {_one_line(error)}", param="messages") from None
        pieces = str(text).split(mark)
        tokens = [token for piece in pieces for token in self.encode(piece, special=False)]
        return "".join(pieces), self.checked(tokens, "messages")

    def _variables(self, request: ChatRequest) -> dict[str, Any]:
        """What the template is told beside the messages."""
        variables = dict(request.chat_template_kwargs)
        for name in ("tokenize", "add_generation_prompt", "chat_template", "conversation", "return_dict", "messages"):
            if name in variables:
                raise ApiError(400, f"chat_template_kwargs.{name} cannot be set", param="chat_template_kwargs")
        if request.reasoning_effort is not None:
            variables["reasoning_effort"] = request.reasoning_effort
        if request.tools and request.tool_choice != "none":
            variables["tools"] = [tool.model_dump(exclude_none=True, exclude={"strict"}) for tool in request.tools]
            for tool in variables["tools"]:
                tool["function"].pop("strict", None)
        for name in variables:
            if not re.search(rf"\b{re.escape(name)}\b", self.template or ""):
                raise ApiError(400, f"{name}: the model's chat template has no such variable", param=name)
        return variables

    def _messages(self, request: ChatRequest) -> list[dict[str, Any]]:
        """The messages as templates expect them: texts joined, arguments of calls as objects."""
        knows_developer = "developer" in (self.template or "")
        messages = []
        for index, message in enumerate(request.messages):
            one = message.model_dump(exclude_none=True, exclude={"annotations", "tool_calls"})
            one["content"] = message.text(index)
            if one["content"] is None and not message.tool_calls:
                raise ApiError(400, f"messages.{index} has no content", param="messages")
            if message.role == "developer" and not knows_developer:
                one["role"] = "system"
            if message.tool_calls:
                one["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
                for call in one["tool_calls"]:
                    call["function"]["arguments"] = _object(call["function"]["arguments"])
            messages.append(one)
        return messages

    def _inert(self, value: Any, mark: str) -> Any:
        """Put a mark into every special token's text, so that the text between marks holds none."""
        if isinstance(value, str):
            if self._special is None:
                return value
            return self._special.sub(lambda found: found[0][:1] + mark + found[0][1:], value)
        if isinstance(value, dict):
            return {self._inert(key, mark): self._inert(one, mark) for key, one in value.items()}
        return [self._inert(one, mark) for one in value] if isinstance(value, list) else value


def _template_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The sources of all chat templates of a tokenizer."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return "\n".join(template.values()) or None
    return template or None


def _object(arguments: str) -> Any:
    """Arguments of a call as an object; text that is none, which an answer cut short may hold, stays text."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _one_line(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
