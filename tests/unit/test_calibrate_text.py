"""Calibration texts: windows spread evenly over text, JSON lines, chats and datasets; one line of every error."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from helpers import calibrated
from helpers.calibrated import words

from tersor.convert.calibrate.text import Calibration, read_windows, source_label
from tersor.errors import InputError, TersorError

TEMPLATE = "{% for message in messages %}t7 {{ message.content }} {% endfor %}"


def read(source: Path | str, count: int = 2, window: int = 4, template: str | None = None) -> list[list[int]]:
    return read_windows(str(source), calibrated.tokenizer(template), count, window, calibrated.VOCABULARY).tolist()


def lines(path: Path, *values: Any) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n\n", encoding="utf-8")
    return path


def refused(message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(TersorError, match=message) as caught:
        read(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_a_record_names_a_file_without_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(words(*range(2, 22)))
    assert read("~/texts/a.txt", 1) == [[2, 3, 4, 5]]
    assert source_label("~/texts/a.txt") == source_label(str(tmp_path / "texts" / "a.txt")) == "a.txt"
    assert source_label("owner/name") == "owner/name"


def test_windows_stand_at_the_start_of_equal_parts_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(*range(2, 22)))
    assert read(tmp_path / "a.txt", 3) == [[2, 3, 4, 5], [8, 9, 10, 11], [14, 15, 16, 17]]
    assert read(tmp_path / "a.txt", 1) == [[2, 3, 4, 5]]


def test_texts_of_json_lines_follow_each_other_with_the_end_of_text_between(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": words(2, 3, 4)}, {"text": words(5, 6, 7), "id": 9})
    assert read(path) == [[2, 3, 4, 1], [5, 6, 7, 1]]


def test_a_conversation_passes_through_the_chat_template(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": words(2, 3)}, {"role": "assistant", "content": words(4)}]}
    assert read(lines(tmp_path / "a.jsonl", talk), 1, template=TEMPLATE) == [[7, 2, 3, 7]]


def test_a_dataset_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read_rows: list[int] = []

    def load_dataset(name: str, **options: Any) -> Any:
        assert (name, options) == ("owner/name", {"split": "train", "streaming": True})
        for number in range(100):
            read_rows.append(number)
            yield {"text": words(2, 3, 4)}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("owner/name") == [[2, 3, 4, 1]] * 2
    assert read_rows == [0, 1]


def test_a_dataset_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"owner/name is no file here.*pip install 'tersor\[calibrate\]'", "owner/name")


def test_a_dataset_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, **options: Any) -> Any:
        raise ConnectionError("no route\nmore words")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    refused("owner/name is no file here, and the Hugging Face Hub did not give it: no route", "owner/name")


def test_a_text_that_is_too_short_says_how_much_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(2, 3, 4, 5, 6, 7))
    refused(r"has 6 tokens, and 2 windows of 4 take 8: ask for at most 4", tmp_path / "a.txt")
    refused(r"has 6 tokens, and 1 windows of 8 take 8: give more text", tmp_path / "a.txt", 1, 8)


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"2 3 \xff")
    refused("is not UTF-8 text: byte 0xff at 4", tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 2 is no JSON"),
        ('{"other": "2"}', "line 2 has neither a text nor a list of messages"),
        ("[1]", "line 2 has neither a text nor a list of messages"),
        ('{"messages": []}', "line 2 is a conversation, and the model has no chat template"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "2"}\n' + line + "\n")
    refused(message, tmp_path / "a.jsonl")


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "2"}]})
    refused("line 1 does not pass through the model's chat template: no", path, template="{{ raise_exception('no') }}")


def test_tokens_of_another_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(2, 3, 40, 5, 6, 7, 8, 9))
    with pytest.raises(InputError, match="holds token 40, and the model has 16"):
        read_windows(str(tmp_path / "a.txt"), calibrated.tokenizer(), 2, 4, 16)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused("no such text file", tmp_path / "a.txt")
    refused("no such text file", "calibration")


def test_windows_are_as_long_as_the_model_allows() -> None:
    assert Calibration("a").shape(None) == (128, 2048)
    assert Calibration("a").shape(1024) == (128, 1024)
    assert Calibration("a", tokens=4096, window=512).shape(1024) == (8, 512)
    assert Calibration("a", tokens=100).shape(None) == (1, 100)
    with pytest.raises(InputError, match="window of 2000 tokens exceeds the model's 1024 positions"):
        Calibration("a", window=2000).shape(1024)
    with pytest.raises(InputError, match="100 calibration tokens are less than one window of 200"):
        Calibration("a", tokens=100, window=200).shape(1024)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ""}, "give a file of text"),
        ({"tokens": 1}, "tokens 1 is not a number of tokens"),
        ({"window": True}, "window True is not a number of tokens"),
        ({"effort": "most"}, "effort 'most' is neither of normal, high"),
        ({"seed": -1}, "seed -1 is not a whole number"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration(**{"source": "a", **options})
