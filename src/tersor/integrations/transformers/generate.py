"""Text generation: `stream` yields text as it becomes decodable, `samples` continues a prompt several times at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from tersor.engine.continuation import (
    Continuation,
    Statistics,
    TextStream,
    full,
    prompt_tokens,
    room_for,
    together,
)
from tersor.engine.sampling import Sampling
from tersor.errors import InputError, TersorError
from tersor.integrations.transformers.decode import NO_TOKEN, Decoder
from tersor.integrations.transformers.finite import first_not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        self._key: tuple[Sampling, int] | None = None
        self._newest: list[Continuation] = []  # whose prompt the decoder has read

    def stream(self, prompt: str | Sequence[int], options: Sampling | None = None) -> TextStream:
        """Continue `prompt`, a text or token ids.

        Raises:
            InputError: an empty prompt where the tokenizer has no beginning-of-sequence token, a prompt that
                leaves no room in the model's context, or a token the model does not have.
            UnsupportedError: a CUDA graph was insisted on and is not possible.
            TersorError: while streaming, logits that are not finite, too little GPU memory, or another stream that has
                begun since.
        """
        ids, chosen, room = self._begin(prompt, options)
        stream = TextStream(len(ids))
        stream.pieces = self._pieces(ids, chosen, room, stream)
        return stream

    def samples(
        self, prompt: str | Sequence[int], samples: int, options: Sampling | None = None
    ) -> tuple[list[Continuation], Statistics]:
        """Continue `prompt` several times at once, as rows of a batch, and return when all have ended.

        The prompt is read once. Rows that have ended are carried along until the last one has. A seed repeats all of
        them; with greedy decoding they are equal, but for what rounding makes of a row.

        Args:
            prompt: a text or token ids.
            samples: how many continuations.
            options: of each of them.

        Raises:
            InputError: fewer than one sample, and as `stream`.
            UnsupportedError, TersorError: as `stream`.
        """
        if samples < 1:
            raise InputError(f"samples is {samples}: it must be at least 1")
        ids, chosen, room = self._begin(prompt, options)
        rows = self._rows(ids, chosen, samples)
        numbers = Statistics(prompt_tokens=len(ids), samples=samples)
        for drawn in self._tokens(ids, chosen, room, numbers, rows):
            for token, row in zip(drawn, rows, strict=True):
                if row.finish_reason is None:
                    row.push(token)
            if all(row.finish_reason is not None for row in rows):
                break
        for row in rows:
            row.end(full(chosen.max_new_tokens, room))
        numbers.finish_reason = together(row.finish_reason for row in rows)
        return rows, numbers

    def _begin(self, prompt: str | Sequence[int], options: Sampling | None) -> tuple[list[int], Sampling, int]:
        """Return the tokens of a prompt, options without gaps, and how many tokens can be drawn."""
        text = self.model.config.get_text_config()
        ids = prompt_tokens(self.tokenizer, prompt, text.vocab_size)
        chosen = (options or Sampling()).resolved(self.model.generation_config)
        assert chosen.max_new_tokens is not None
        return ids, chosen, room_for(len(ids), chosen.max_new_tokens, getattr(text, "max_position_embeddings", None))

    def _rows(self, ids: list[int], options: Sampling, samples: int) -> list[Continuation]:
        eos = frozenset() if options.ignore_eos else self._eos()
        return [Continuation(self.tokenizer, ids, eos, options.stop) for _ in range(samples)]

    def _decoder_for(self, options: Sampling, length: int, samples: int) -> Decoder:
        """The decoder of the last stream if it can serve this one, else a new one."""
        key = (replace(options, seed=None, max_new_tokens=None, stop=(), ignore_eos=False), samples)
        if self._decoder is None or self._key != key or self._decoder.length < length:
            self._decoder = None  # frees the old cache and graph before the new ones are made
            self._decoder = Decoder(self.model, options, length, self._cuda_graph, samples)
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
        (row,) = rows = self._rows(ids, options, 1)
        stream.tokens = row.tokens
        for (token,) in self._tokens(ids, options, room, stream.statistics, rows):
            piece = row.push(token)
            if piece:
                yield piece
            if row.finish_reason is not None:
                break
        rest = row.end(full(options.max_new_tokens, room))
        stream.statistics.finish_reason = row.finish_reason
        if rest:
            yield rest

    def _tokens(
        self, ids: list[int], options: Sampling, room: int, numbers: Statistics, rows: list[Continuation]
    ) -> Iterator[list[int]]:
        """Draw up to `room` tokens for every row. On a GPU a step is under way while the host works on tokens."""
        started = time.perf_counter()
        several = f", {len(rows)} times" if len(rows) > 1 else ""
        self._newest = rows
        try:
            decoder = self._decoder_for(options, len(ids) + room, len(rows))
            decoder.prefill(ids, options.seed)
        except torch.OutOfMemoryError:
            message = f"GPU memory ran out with {len(ids)} prompt tokens and room for {room} new ones{several}"
            raise TersorError(f"{message}: use fewer") from None
        ahead = 1 if decoder.device.type == "cuda" else 0
        under_way = deque([decoder.publish()])
        self._check(decoder.fetch(under_way[0]), ids, rows)
        decoding = time.perf_counter()
        numbers.prefill_seconds = decoding - started
        launched = 1
        for drawn in range(1, room + 1):
            if self._newest is not rows:
                raise TersorError("another stream of this generator has begun: read one to its end, or make two")
            while len(under_way) <= ahead and launched < room:
                decoder.step()
                under_way.append(decoder.publish())
                launched += 1
            tokens = decoder.fetch(under_way.popleft())
            self._check(tokens, ids, rows)
            numbers.new_tokens += sum(row.finish_reason is None for row in rows)
            numbers.capture_seconds = decoder.capture_seconds
            numbers.cuda_graph, numbers.eager_reason = decoder.graph is not None, decoder.eager_reason
            if drawn > 1:
                numbers.decode_seconds = time.perf_counter() - decoding - decoder.capture_seconds
                numbers.tokens_per_second = (numbers.new_tokens - numbers.samples) / numbers.decode_seconds
            yield tokens

    def _check(self, tokens: list[int], ids: list[int], rows: list[Continuation]) -> None:
        """Raise where the token of a row that goes on could not be drawn: which, and the first layer that is wrong."""
        for token, row in zip(tokens, rows, strict=True):
            if token != NO_TOKEN or row.finish_reason is not None:
                continue
            seen = torch.tensor([[*ids, *row.tokens]], dtype=torch.int64, device=self.model.device)
            raise TersorError(
                f"new token {len(row.tokens) + 1} cannot be drawn: its logits are not finite"
                f"{first_not_finite(self.model, seen)}: try bfloat16 or float32"
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
