"""Which tokens is a model calibrated on? Windows spread evenly over a text, a file of JSON lines, or a dataset."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tersor import files
from tersor.convert.transforms import CALIBRATED
from tersor.errors import InputError, UnsupportedError
from tersor.evaluate.windows import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 2048
WINDOWS = 128
EFFORTS = ("normal", "high")
_LINES = (".jsonl", ".ndjson")
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LONGEST_SEED = 1 << 63


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a model is calibrated on, and how thoroughly.

    Attributes:
        source: a file of text (UTF-8), a file of JSON lines (`.jsonl`, `.ndjson`) of which each has `text` or
            `messages`, or the id of a dataset on the Hugging Face Hub, `owner/name`.
        tokens: how many tokens are used, a multiple of the window; `None` is 128 windows.
        window: tokens in a window; `None` is 2,048, or as many as the model takes.
        effort: `normal`, or `high`: with one backward pass through the model.
        seed: of the labels that the backward pass draws from the model.
        transforms: what is done to the model beside choosing codes, of `convert.transforms.TRANSFORMS`.
    """

    source: str
    tokens: int | None = None
    window: int | None = None
    effort: str = "normal"
    seed: int = 0
    transforms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.source, str | os.PathLike) or not os.fspath(self.source):
            raise InputError(f"calibration is {self.source!r}: give a file of text or the id of a dataset")
        object.__setattr__(self, "source", os.fspath(self.source))
        for name, value in (("tokens", self.tokens), ("window", self.window)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
                raise InputError(f"calibration {name} {value!r} is not a number of tokens, 2 at least")
        if self.effort not in EFFORTS:
            raise InputError(f"effort {self.effort!r} is neither of {', '.join(EFFORTS)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < _LONGEST_SEED:
            raise InputError(f"seed {self.seed!r} is not a whole number from 0 on")

    @property
    def changes(self) -> bool:
        """Whether a transform changes the model while it is calibrated."""
        return any(name in CALIBRATED for name in self.transforms)

    def shape(self, positions: int | None) -> tuple[int, int]:
        """Return how many windows of how many tokens a model is calibrated on.

        Args:
            positions: tokens that the model takes at once; `None` is any number.

        Raises:
            InputError: a window is longer than that, or than all tokens.
        """
        window = self.window or min(WINDOW, positions or WINDOW, self.tokens or WINDOW)
        if positions is not None and window > positions:
            raise InputError(f"a calibration window of {window} tokens exceeds the model's {positions} positions")
        count = WINDOWS if self.tokens is None else self.tokens // window
        if count == 0:
            raise InputError(f"{self.tokens} calibration tokens are less than one window of {window}: ask for more")
        return count, window


def read_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, count: int, window: int, vocabulary: int
) -> torch.Tensor:
    """Return windows that are spread evenly over a source: one at the start of each of as many equal parts.

    A text is tokenised once, without special tokens. Of JSON lines the tokens of every text, or of every conversation
    in the model's chat template, follow each other, with the end-of-text token between texts.

    Args:
        source: as `Calibration.source`.
        tokenizer: the model's.
        count, window: windows, and tokens in each.
        vocabulary: how many tokens the model has rows for.

    Returns:
        int64 [count, window].

    Raises:
        InputError: the source cannot be read, is no UTF-8, holds a line that is no JSON or has neither text nor
            messages, or has fewer tokens than asked for; messages and no chat template; tokens of another model.
        UnsupportedError: a dataset is asked for, and the package `datasets` is not installed.
    """
    ids = _tokens(source, tokenizer, count * window)
    if len(ids) < count * window:
        most = len(ids) // window
        way = f"ask for at most {most * window} (--calibration-tokens), or give more" if most else "give more text"
        raise InputError(
            f"{source}: has {len(ids)} tokens, and {count} windows of {window} take {count * window}: {way}"
        )
    largest = max(ids)
    if largest >= vocabulary:
        raise InputError(f"{source}: holds token {largest}, and the model has {vocabulary}: its tokenizer is another's")
    stride = len(ids) // count
    windows = [ids[index * stride : index * stride + window] for index in range(count)]
    return torch.tensor(windows, dtype=torch.int64)


def _tokens(source: str, tokenizer: PreTrainedTokenizerBase, needed: int) -> list[int]:
    """Return the tokens of a source; of a dataset, which may have no end, not many more than are needed."""
    try:
        path = files.user_path(source)
        there = bool(files.mode_of(path))
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from None
    if there and path.suffix.lower() in _LINES:
        return [token for part in _documents(_json_lines(source), tokenizer) for token in part]
    if there or not _DATASET_ID.fullmatch(source) or path.suffix.lower() in (".txt", *_LINES):
        return list(tokenizer(read_text(source), add_special_tokens=False, verbose=False)["input_ids"])
    ids: list[int] = []
    for part in _documents(_dataset(source), tokenizer):
        ids += part
        if len(ids) >= needed:
            break
    return ids


def _json_lines(path: str) -> Iterator[tuple[str, Any]]:
    """Yield (where it is, value) for every line of a file of JSON that is not empty."""
    # Only "\n" ends a line: JSON texts may hold the other characters that end lines of text.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}: line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is no JSON: {error}") from None


def _dataset(name: str) -> Iterator[tuple[str, Any]]:
    """Yield (where it is, row) for the rows of the training split of a dataset, streamed from the Hub."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UnsupportedError(
            f"{name} is no file here, and a dataset takes the package datasets: pip install 'tersor[calibrate]'"
        ) from None
    try:
        for number, row in enumerate(load_dataset(name, split="train", streaming=True)):
            yield f"{name}: row {number}", row
    except Exception as error:  # the library has many for a dataset that it does not get
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InputError(f"{name} is no file here, and the Hugging Face Hub did not give it: {reason}") from None


def _documents(rows: Iterable[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the tokens of every row: of its text, or of its messages in the chat template."""
    end = tokenizer.eos_token_id
    for where, row in rows:
        if isinstance(row, Mapping) and isinstance(row.get("text"), str):
            ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
            yield [*ids, end] if isinstance(end, int) else list(ids)
        elif isinstance(row, Mapping) and isinstance(row.get("messages"), list):
            yield _conversation(where, row, tokenizer)
        else:
            raise InputError(f"{where} has neither a text nor a list of messages")


def _conversation(where: str, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where} is a conversation, and the model has no chat template: give plain text")
    try:
        text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    except Exception as error:  # a template raises what it likes
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise InputError(f"{where} does not pass through the model's chat template: {reason}") from None
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def source_label(source: str) -> str:
    """Return what a source is called in a record that others read: a file's name without its folders, or the id."""
    path = files.user_path(source)
    return path.name if path.exists() else source
