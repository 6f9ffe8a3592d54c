"""What is shown while tokens come: whole characters, and nothing of a stop text."""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers import tiny_lm

from tersor.engine.text import Detokenizer, StopFilter

TEXTS = [
    "plain",
    "caf\u00e9 na\u00efve",
    "\u65e5\u672c\u8a9e",
    "a \U0001f600\U0001f680 b",
    "e\u0301 \u0639\u0631\u0628\u064a",
]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_several_bytes_are_not_broken(text: str) -> None:
    ids = tiny_lm.tokenizer()(text)["input_ids"]
    detokenizer = Detokenizer(tiny_lm.tokenizer())
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert detokenizer.flush() == ""


def test_a_character_takes_several_tokens_here() -> None:
    ids = tiny_lm.tokenizer()("\U0001f680")["input_ids"]
    assert len(ids) > 1
    detokenizer = Detokenizer(tiny_lm.tokenizer())
    assert [detokenizer.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_not_text() -> None:
    detokenizer = Detokenizer(tiny_lm.tokenizer())
    ids = tiny_lm.tokenizer()("one two")["input_ids"]
    assert "".join(detokenizer.push(token) for token in [ids[0], 0, *ids[1:]]) == "one two"


class Words:
    """A tokenizer that writes a space before every word but the first."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(("zero", "one", "two")[token] for token in ids)


def test_the_first_piece_keeps_the_space_after_the_prompt() -> None:
    detokenizer = Detokenizer(Words(), [0])
    assert [detokenizer.push(1), detokenizer.push(2)] == [" one", " two"]
    assert Detokenizer(Words()).push(1) == "one"


def run(stops: tuple[str, ...], *pieces: str) -> tuple[list[str], StopFilter]:
    stop_filter = StopFilter(stops)
    shown = [stop_filter.push(piece) for piece in pieces]
    return shown, stop_filter


def test_what_may_begin_a_stop_text_is_held_back() -> None:
    shown, stop_filter = run(("END",), "one E", "N", "T two")
    assert shown == ["one ", "", "ENT two"] and not stop_filter.found


def test_a_stop_text_across_pieces() -> None:
    shown, stop_filter = run(("END",), "one E", "N", "D two")
    assert shown == ["one ", "", ""] and stop_filter.found and stop_filter.flush() == ""


def test_the_earliest_of_several_stop_texts() -> None:
    shown, stop_filter = run(("two", "one"), "zero one two")
    assert shown == ["zero "] and stop_filter.found


def test_held_text_comes_out_at_the_end() -> None:
    shown, stop_filter = run(("\n\n",), "a\n")
    assert shown == ["a"] and stop_filter.flush() == "\n"


def test_a_stop_text_that_overlaps_itself() -> None:
    shown, stop_filter = run(("aab",), "a", "a", "a", "b", "c")
    assert "".join(shown) == "a" and stop_filter.found


def test_exactly_the_longest_end_that_begins_a_stop_text_is_held_back() -> None:
    choose = random.Random(0)
    for _ in range(300):
        stops = tuple("".join(choose.choices("ab", k=choose.randrange(1, 6))) + "c" for _ in range(2))
        text = "".join(choose.choices("ab", k=8))
        cut = choose.randrange(8)
        shown, _ = run(stops, text[:cut], text[cut:])
        begins = [at for at in range(9) if any(stop.startswith(text[at:]) for stop in stops)]
        assert "".join(shown) == text[: begins[0]]


def test_without_stop_texts_everything_passes() -> None:
    shown, stop_filter = run((), "a", "b")
    assert shown == ["a", "b"] and stop_filter.flush() == ""
