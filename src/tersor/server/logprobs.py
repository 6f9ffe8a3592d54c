"""Log probabilities in OpenAI's two shapes, one entry a token, and the bytes behind a token."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tersor.engine.outputs import Logprob, Logprobs
from tersor.engine.text import Detokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST = -9999.0
"""Stands for a token that cannot come: JSON holds no infinity."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Letter -> byte of byte-level BPE: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class TokenBytes:
    """The bytes of each token of a vocabulary, also of one that is part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_level = "ByteLevel" in repr(decoder)
        self._added = {int(token): str(text) for token, text in tokenizer.added_tokens_decoder.items()}

    def __call__(self, token: int) -> bytes:
        """Return the bytes of a token."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # rows of the head beyond the vocabulary
            return b""
        if self._byte_level:
            return bytes(_byte_of_letter()[letter] for letter in str(piece))
        if found := _BYTE.fullmatch(str(piece)):
            return bytes([int(found[1], 16)])
        return str(piece).replace("\u2581", " ").encode()


def chat_entries(
    tokens: Sequence[int], logprobs: Sequence[Logprobs], most: int, bytes_of: TokenBytes
) -> list[dict[str, Any]]:
    """Return an entry a token in the shape of chat completions, with the `most` most probable tokens beside each."""
    entries = []
    for token, found in zip(tokens, logprobs, strict=True):
        entry = _chat_entry(token, found[token], bytes_of)
        entry["top_logprobs"] = [_chat_entry(other, one, bytes_of) for other, one in _top(found, most)]
        entries.append(entry)
    return entries


def _chat_entry(token: int, found: Logprob, bytes_of: TokenBytes) -> dict[str, Any]:
    return {"token": found.decoded_token, "logprob": max(found.logprob, LEAST), "bytes": list(bytes_of(token))}


def _top(found: Logprobs, most: int) -> list[tuple[int, Logprob]]:
    """The most probable tokens of an entry; the one drawn is among them only if it is one of them."""
    return sorted(((token, one) for token, one in found.items() if one.rank <= most), key=lambda pair: pair[1].rank)


class PlainEntries:
    """Entries in the shape of plain completions, which say where in the text each token begins."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], most: int, *, skip_special: bool = True
    ) -> None:
        """Begin.

        Args:
            tokenizer: of the model.
            prompt: tokens before the first one.
            most: how many of the most probable tokens are shown.
            skip_special: whether special tokens are left out of the text.
        """
        self._text = Detokenizer(tokenizer, prompt, skip_special_tokens=skip_special)
        self._tokenizer, self._most, self._offset = tokenizer, most, 0

    def of(self, tokens: Sequence[int], logprobs: Sequence[Logprobs | None]) -> dict[str, list[Any]]:
        """Return the entries of the next tokens; `None`, for a text's first token, has none to show."""
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, found in zip(tokens, logprobs, strict=True):
            name = self._tokenizer.decode([token]) if found is None else found[token].decoded_token
            shown["tokens"].append(name)
            shown["token_logprobs"].append(None if found is None else max(found[token].logprob, LEAST))
            shown["top_logprobs"].append(None if found is None else self._alternatives(token, found))
            shown["text_offset"].append(self._offset)
            self._offset += len(self._text.push(token))
        return shown

    def _alternatives(self, token: int, found: Logprobs) -> dict[str, float]:
        """Text -> log probability of the most probable tokens and of the one drawn; of equal texts the likelier one."""
        pairs = [*_top(found, self._most), (token, found[token])]
        best: dict[str, float] = {}
        for _, one in pairs:
            best[one.decoded_token] = max(one.logprob, best.get(one.decoded_token, LEAST))
        return best
