"""Texts of tokens as they come are those of all tokens at once, whoever decodes them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers import tiny_lm
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tersor.engine.text import Detokenizer
from tersor.engine.token_texts import TokenTexts
from tersor.integrations.transformers import load

BROKEN = "\ufffd"


def of_bytes() -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with tokens that were added: some special, some with letters that stand for bytes."""
    tokenizer = load.load_tokenizer(tiny_lm.TINY)
    added = [" added \u65e5", "\u0120q", "\u00ac!", f"x{BROKEN}"]
    tokenizer.add_tokens([*added, AddedToken("<|tool|>", special=True)])
    return tokenizer


def of_pieces() -> PreTrainedTokenizerBase:
    """A tokenizer whose first token loses the space before it, and which writes what it does not know as bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581a", "\u2581the", "the", "."]
    model = models.BPE({piece: token for token, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int], skip: bool) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("skip", [True, False])
def test_after_any_bytes_the_text_so_far_is_the_decoded_whole_up_to_a_broken_end(skip: bool) -> None:
    tokenizer, choose = of_bytes(), random.Random(0)
    broken = [token for token in range(600) if BROKEN in decode(tokenizer, [token], skip)]
    several = tokenizer("\u20ac \u65e5\u672c \U0001f680e\u0301", add_special_tokens=False)["input_ids"]
    rare = [*broken, *several, 0, *range(8190, len(tokenizer) + 2)]
    held = 0
    for _ in range(60):
        tokens = [choose.choice(rare) if choose.random() < 0.6 else choose.randrange(8192) for _ in range(16)]
        tokens += several
        cut = choose.choice((0, 1, 4))  # of a prompt, which may end in the middle of a character
        detokenizer = Detokenizer(tokenizer, tokens[:cut], skip_special_tokens=skip)
        begins, shown = len(decode(tokenizer, tokens[:cut], skip)), ""
        for end in range(cut + 1, len(tokens) + 1):
            piece = detokenizer.push(tokens[end - 1])
            whole = decode(tokenizer, tokens[:end], skip)[begins:]
            assert shown + piece == (shown if whole.endswith(BROKEN) else whole)
            shown += piece
            held += whole.endswith(BROKEN)
        assert shown + detokenizer.flush() == decode(tokenizer, tokens, skip)[begins:]
    assert held > 60


def test_a_token_that_ends_a_character_of_the_prompt_adds_what_comes_after_it() -> None:
    tokenizer = of_bytes()
    first, second, last = tokenizer.convert_tokens_to_ids(["\u00e2", "\u0124", "\u00ac!"])  # letters for bytes
    assert decode(tokenizer, [first, second, last], True) == "\u20ac!"
    assert Detokenizer(tokenizer, [first, second]).push(last) == "!"


@pytest.mark.parametrize("skip", [True, False])
def test_spaces_that_depend_on_the_token_before_and_bytes_of_pieces_are_those_of_the_whole(skip: bool) -> None:
    tokenizer, choose = of_pieces(), random.Random(1)
    words = [*([token] for token in (1, *range(258, 263))), [2 + byte for byte in "\u20ac".encode()]]
    for _ in range(60):
        words = choose.sample(words, len(words))
        tokens = [token for word in words for token in word]
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
        text = "".join(detokenizer.push(token) for token in tokens)
        assert text + detokenizer.flush() == decode(tokenizer, tokens, skip)


def test_a_text_is_made_once_for_all_requests() -> None:
    tokenizer = of_bytes()
    first = TokenTexts.of(tokenizer, skip_special_tokens=True)
    assert first is TokenTexts.of(tokenizer, skip_special_tokens=True) and first.joined
    assert first is not TokenTexts.of(tokenizer, skip_special_tokens=False)
    assert first is not TokenTexts.of(tiny_lm.tokenizer(), skip_special_tokens=True)
    assert first[100] == decode(tokenizer, [100], True) and 100 in first


def test_tokens_that_are_added_later_are_text_too() -> None:
    tokenizer = load.load_tokenizer(tiny_lm.TINY)
    assert Detokenizer(tokenizer).push(8192) == ""
    assert TokenTexts.of(tokenizer, skip_special_tokens=True)[8192] == ""
    tokenizer.add_tokens(["later"])
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(8192), detokenizer.flush()] == ["later", ""]
    assert TokenTexts.of(tokenizer, skip_special_tokens=True)[8192] == "later"


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer whose class changes what the library decodes."""

    def _decode(self, *args: Any, **options: Any) -> str:
        return str(super()._decode(*args, **options)).upper()


def test_a_class_that_decodes_by_itself_is_asked() -> None:
    tokenizer = Shouting(tokenizer_object=of_pieces().backend_tokenizer)
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push(token) for token in (259, 260, 262)) == "A THE."
    assert not TokenTexts.of(tokenizer, skip_special_tokens=True).joined
