"""How does a batch read and write text as the server does? Templates, tool calls and reasoning of a model's chats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from tersor.engine.openai_body import CHAT, COMPLETIONS, Ask
from tersor.engine.options import resolved
from tersor.engine.outputs import CompletionOutput, RequestOutput
from tersor.engine.params import SamplingParams
from tersor.errors import InputError
from tersor.server.chat import WholeMessage, forced_grammar
from tersor.server.choice import Choice
from tersor.server.errors import ApiError, of_validation
from tersor.server.events import Plain, Text
from tersor.server.logprobs import PlainEntries, TokenBytes, chat_entries
from tersor.server.parsers import Parsers
from tersor.server.prompts import Prompts
from tersor.server.requests import ChatRequest, CompletionRequest, NamedTool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Request = TypeVar("Request", ChatRequest, CompletionRequest)

_ANY = [{"role": "user", "content": "."}]
_TEMPLATE = ("tools", "tool_choice", "parallel_tool_calls", "reasoning_effort")


class ModelDialect:
    """A `batch_lines.Dialect` of a model behind the server's templates and parsers.

    Attributes:
        context, vocabulary: of the model, in tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        vocabulary: int,
        *,
        defaults: Mapping[str, Any] | None = None,
        tool_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> None:
        """Take a model's tokenizer.

        Args:
            tokenizer: of the model.
            context, vocabulary: in tokens.
            defaults: the model's generation config.
            tool_parser, reasoning_parser: as `ServerOptions` has them.

        Raises:
            InputError: no such parser.
        """
        self.context, self.vocabulary = context, vocabulary
        self._tokenizer, self._defaults = tokenizer, defaults or {}
        self._prompts = Prompts(tokenizer, vocabulary)
        self._parsers = Parsers.of(tool_parser, reasoning_parser, self._prompts.template)
        self._bytes_of = TokenBytes(tokenizer)
        self._beginnings: dict[str, str] = {}

    def encode(self, text: str) -> Sequence[int]:
        """Return the tokens of a text that is a prompt by itself."""
        return self._prompts.encode(text)

    def chat(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> Sequence[int]:
        """Return the tokens of a chat, ready to be answered.

        Raises:
            InputError: the model's template refuses the messages or has no such option.
        """
        return self._shown(messages, options)[1]

    def check(self, url: str, body: Any) -> None:
        """Refuse the body of a request that the server would refuse.

        Raises:
            InputError: with the server's words.
        """
        if url == CHAT:
            _checked(ChatRequest, body, self.vocabulary)
        elif url == COMPLETIONS:
            _checked(CompletionRequest, body, self.vocabulary)

    def params(self, ask: Ask) -> SamplingParams | None:
        """Return how tokens are drawn, with what the model's config fills in and what who reads the answer needs.

        Raises:
            InputError: options that exclude each other, or tools that this model's answers cannot be read for.
        """
        if ask.params is None:
            return None
        params = resolved(ask.params, self._defaults)
        if ask.url != CHAT:
            return params
        request = _request(_ANY, ask.options)
        names = _names(request)
        if request.forced:
            return replace(params, grammar=forced_grammar(request))
        if names and self._parsers.tools == "none":
            raise InputError("no parser for this model's tool calls: name one with --tool-parser")
        if self._parsers.reasoning != "none":
            params = replace(params, stop=())  # they are looked for outside the reasoning
        if self._parsers.special and (names or self._parsers.reasoning != "none"):
            params = replace(params, skip_special_tokens=False)
        return params

    def answer(
        self, ask: Ask, answers: Sequence[RequestOutput], *, name: str, model: str, created: int
    ) -> dict[str, Any]:
        """Return the body that answers a chat or completions, as the server would; `name` names its calls, too."""
        chat = ask.url == CHAT
        choices: list[dict[str, Any]] = []
        drawn = 0
        for output in answers:
            for one in output.outputs:
                count, choice = self._message(ask, one, output) if chat else self._text(ask, one, output)
                for number, call in enumerate(choice["message"].get("tool_calls", ()) if chat else ()):
                    digest = hashlib.sha256(f"{name} {len(choices)} {number}".encode()).hexdigest()
                    call["id"] = f"call_{digest[:24]}"
                choices.append({"index": len(choices), **choice})
                drawn += count
        prompt = sum(len(output.prompt_token_ids) for output in answers)
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": model,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": drawn,
                "total_tokens": prompt + drawn,
                "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in answers)},
            },
        }

    def _message(self, ask: Ask, one: CompletionOutput, output: RequestOutput) -> tuple[int, dict[str, Any]]:
        """Return how many tokens an answer of a chat has, and its choice."""
        asked = ask.params
        assert asked is not None
        request = _request(_ANY, ask.options)
        forced = None
        if request.forced:
            forced = request.tool_choice.function.name if isinstance(request.tool_choice, NamedTool) else ""
        names = _names(request)
        parser, watch = self._parsers.chain(
            self._beginning(ask.options), names, forced, tuple(asked.stop), asked.include_stop_str_in_output
        )
        special = self._parsers.special and (names or self._parsers.reasoning != "none") and not request.forced
        choice = Choice(
            self._tokenizer,
            output.prompt_token_ids,
            parser,
            watch,
            one_call=bool(names) and not request.parallel_tool_calls,
            skip_special=asked.skip_special_tokens and not special,
        )
        news, message = choice.update(one), WholeMessage()
        message.add(news)
        logprobs = None
        if asked.logprobs is not None:
            entries = chat_entries(news.tokens, news.logprobs, asked.logprobs, self._bytes_of)
            logprobs = {"content": entries, "refusal": None}
        return choice.count, {"message": message.body(), "logprobs": logprobs, "finish_reason": message.reason}

    def _text(self, ask: Ask, one: CompletionOutput, output: RequestOutput) -> tuple[int, dict[str, Any]]:
        """Return how many tokens a continuation has, and its choice."""
        asked = ask.params
        assert asked is not None
        prompt, skip = output.prompt_token_ids, asked.skip_special_tokens
        choice = Choice(self._tokenizer, prompt, Plain(), skip_special=skip)
        news = choice.update(one)
        logprobs = None
        if asked.logprobs is not None:
            entries = PlainEntries(self._tokenizer, prompt, asked.logprobs, skip_special=skip)
            logprobs = entries.of(news.tokens, news.logprobs)
        text = "".join(event.text for event in news.events if isinstance(event, Text))
        return choice.count, {"text": text, "logprobs": logprobs, "finish_reason": news.finish_reason}

    def _beginning(self, options: Mapping[str, Any]) -> str:
        """Return the end of what an answer continues, which may have begun its reasoning."""
        key = json.dumps(options, sort_keys=True)
        if key not in self._beginnings:
            self._beginnings[key] = self._shown(_ANY, options)[0][-64:]
        return self._beginnings[key]

    def _shown(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> tuple[str, list[int]]:
        try:
            return self._prompts.chat(_request(messages, options))
        except ApiError as error:
            raise InputError(error.message) from None


def _request(messages: list[dict[str, Any]], options: Mapping[str, Any]) -> ChatRequest:
    """Return a chat as the server would get it.

    Raises:
        InputError: it would refuse it.
    """
    given = {name: options[name] for name in _TEMPLATE if name in options}
    others = {name: value for name, value in options.items() if name not in _TEMPLATE}
    return _checked(ChatRequest, {"messages": messages, **given, "chat_template_kwargs": others}, 0)


def _checked(kind: type[Request], body: Any, vocabulary: int) -> Request:
    try:
        request = kind.model_validate(body)
        request.check(vocabulary)
    except ValidationError as error:
        raise InputError(of_validation(error).message) from None
    except ApiError as error:
        raise InputError(error.message) from None
    return request


def _names(request: ChatRequest) -> list[str]:
    return [tool.function.name for tool in request.tools] if request.tool_choice != "none" else []
