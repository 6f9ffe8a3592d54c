"""Single-stream text generation: `stream` yields text as it becomes decodable and counts what it took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from tersor.engine.sampling import Sampling
from tersor.engine.text import Detokenizer, StopFilter
from tersor.errors import InputError, TersorError
from tersor.integrations.transformers.decode import NO_TOKEN, Decoder
from tersor.integrations.transformers.finite import first_not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(kw_only=True)
class Statistics:
    """What a stream took; filled in while it runs, complete when it ends.

    Attributes:
        prompt_tokens: tokens read.
        new_tokens: tokens drawn, the end-of-sequence token included.
        prefill_seconds: from the call to the first token on the host.
        capture_seconds: warming up and capturing the CUDA graph; 0 when no graph was made in this stream.
        decode_seconds: wall clock of the tokens after the first, the consumer's own time included.
        tokens_per_second: (new_tokens - 1) / decode_seconds; None with fewer than two tokens.
        finish_reason: "eos", "stop", "length" (max_new_tokens) or "context" (the model's positions are used).
        cuda_graph: whether the decode step was a CUDA graph.
        eager_reason: why it was not.
    """

    prompt_tokens: int
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    capture_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens_per_second: float | None = None
    finish_reason: str | None = None
    cuda_graph: bool = False
    eager_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)


class TextStream(Iterator[str]):
    """Pieces of text, and the `statistics` and `tokens` (ids drawn so far) of the stream they come from."""

    def __init__(self, prompt_tokens: int) -> None:
        self.statistics = Statistics(prompt_tokens=prompt_tokens)
        self.tokens: list[int] = []
        self._pieces: Iterator[str] = iter(())

    def __next__(self) -> str:
        return next(self._pieces)


class Generator:
    """A model and its tokenizer, ready to continue prompts one after the other.

    Keeps the cache and the CUDA graph of the last stream: a following one with the same sampling options that
    is not longer replays it. Two streams of one Generator must not run at the same time.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, cuda_graph: bool | None = None
    ) -> None:
        """Make a generator.

        Args:
            model: a causal language model of transformers, in eval mode.
            tokenizer: its tokenizer.
            cuda_graph: True insists on a CUDA graph, False forbids it, None uses one where it works.
        """
        self.model = model
        self.tokenizer = tokenizer
        self._cuda_graph = cuda_graph
        self._decoder: Decoder | None = None
        self._key: Sampling | None = None

    def stream(self, prompt: str | Sequence[int], options: Sampling | None = None) -> TextStream:
        """Continue `prompt`, a text or token ids.

        Raises:
            InputError: an empty prompt where the tokenizer has no beginning-of-sequence token, a prompt that
                leaves no room in the model's context, or a token the model does not have.
            UnsupportedError: a CUDA graph was insisted on and is not possible.
            TersorError: while streaming, logits that are not finite, or too little GPU memory.
        """
        ids = self._encode(prompt)
        chosen = (options or Sampling()).resolved(self.model.generation_config)
        assert chosen.max_new_tokens is not None
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = chosen.max_new_tokens if limit is None else min(chosen.max_new_tokens, limit - len(ids))
        if room < 1:
            raise InputError(f"the prompt has {len(ids)} tokens, the model {limit} positions: shorten the prompt")
        stream = TextStream(len(ids))
        stream._pieces = self._pieces(ids, chosen, room, stream)
        return stream

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        ids = list(self.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt)
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        if not ids:
            raise InputError("the prompt is empty and the tokenizer has no token to begin with: give a text")
        vocabulary = self.model.config.get_text_config().vocab_size
        if max(ids) >= vocabulary or min(ids) < 0:
            raise InputError(f"the prompt holds token {max(ids)}, the model has {vocabulary}: another tokenizer?")
        return ids

    def _decoder_for(self, options: Sampling, length: int) -> Decoder:
        """The decoder of the last stream if it can serve this one, else a new one."""
        key = replace(options, seed=None, max_new_tokens=None, stop=(), ignore_eos=False)
        if self._decoder is None or self._key != key or self._decoder.length < length:
            self._decoder = None  # frees the old cache and graph before the new ones are made
            self._decoder = Decoder(self.model, options, length, self._cuda_graph)
            self._key = key
        return self._decoder

    def _eos(self) -> frozenset[int]:
        for value in (
            self.model.generation_config.eos_token_id,
            self.model.config.get_text_config().eos_token_id,
            self.tokenizer.eos_token_id,
        ):
            if value is not None:
                return frozenset(value if isinstance(value, (list, tuple)) else [value])
        return frozenset()

    def _pieces(self, ids: list[int], options: Sampling, room: int, stream: TextStream) -> Iterator[str]:
        eos = frozenset() if options.ignore_eos else self._eos()
        text, stops = Detokenizer(self.tokenizer, ids), StopFilter(options.stop)
        reason = "length" if room == options.max_new_tokens else "context"
        for token in self._tokens(ids, options, room, stream):
            stream.tokens.append(token)
            if token in eos:
                reason = "eos"
                break
            piece = stops.push(text.push(token))
            if piece:
                yield piece
            if stops.found:
                reason = "stop"
                break
        stream.statistics.finish_reason = reason
        if not stops.found:
            rest = stops.push(text.flush()) + ("" if stops.found else stops.flush())
            if stops.found:
                stream.statistics.finish_reason = "stop"
            if rest:
                yield rest

    def _tokens(self, ids: list[int], options: Sampling, room: int, stream: TextStream) -> Iterator[int]:
        """Draw up to `room` tokens. On a GPU one step is always under way while the host works on a token."""
        numbers = stream.statistics
        started = time.perf_counter()
        try:
            decoder = self._decoder_for(options, len(ids) + room)
            decoder.prefill(ids, options.seed)
        except torch.OutOfMemoryError:
            message = f"GPU memory ran out with {len(ids)} prompt tokens and room for {room} new ones: use fewer"
            raise TersorError(message) from None
        ahead = 1 if decoder.device.type == "cuda" else 0
        under_way = deque([decoder.publish()])
        self._check(decoder.fetch(under_way[0]), ids, stream)
        decoding = time.perf_counter()
        numbers.prefill_seconds = decoding - started
        launched = 1
        for drawn in range(1, room + 1):
            while len(under_way) <= ahead and launched < room:
                decoder.step()
                under_way.append(decoder.publish())
                launched += 1
            token = decoder.fetch(under_way.popleft())
            self._check(token, ids, stream)
            numbers.new_tokens = drawn
            numbers.capture_seconds = decoder.capture_seconds
            numbers.cuda_graph, numbers.eager_reason = decoder.graph is not None, decoder.eager_reason
            if drawn > 1:
                numbers.decode_seconds = time.perf_counter() - decoding - decoder.capture_seconds
                numbers.tokens_per_second = (drawn - 1) / numbers.decode_seconds
            yield token

    def _check(self, token: int, ids: list[int], stream: TextStream) -> None:
        """Raise where a token could not be drawn, with its number and the first layer that went wrong."""
        if token != NO_TOKEN:
            return
        seen = torch.tensor([[*ids, *stream.tokens]], dtype=torch.int64, device=self.model.device)
        number = len(stream.tokens) + 1
        raise TersorError(
            f"new token {number} cannot be drawn: its logits are not finite{first_not_finite(self.model, seen)}: try "
            "bfloat16 or float32"
        )


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int], **options: Any
) -> TextStream:
    """Continue one prompt; `options` are the fields of `Sampling`. For several prompts keep a `Generator`.

    Raises:
        InputError: see `Generator.stream` and `Sampling`.
    """
    return Generator(model, tokenizer).stream(prompt, Sampling(**options))


def chat_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of `text` as the user's turn in the tokenizer's chat template.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template: give the prompt as plain text, without --chat")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return [int(token) for token in cast("list[int]", ids)]
