"""Which text is predicted? A file, tokenised once and cut into windows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tersor import files
from tersor.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        InputError: missing, a directory, empty, or not UTF-8.
    """
    try:
        file = files.user_path(path)
        data = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such text file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        position = error.start
        raise InputError(f"{file}: is not UTF-8 text: byte {data[position]:#04x} at {position}") from None
    if not text.strip():
        raise InputError(f"{file}: is empty: give one that holds text")
    return text


def cut_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, *, window: int = 512, max_tokens: int | None = None
) -> torch.Tensor:
    """Tokenise `text` without special tokens and cut it into windows.

    Args:
        text: the text.
        tokenizer: a transformers tokenizer.
        window: tokens in a window, at least 2.
        max_tokens: use only the first this many tokens.

    Returns:
        int64 [windows, window].

    Raises:
        InputError: `window` below 2, or fewer tokens than one window.
    """
    if window < 2:
        raise InputError(f"window is {window}: it must be at least 2 tokens, one to read and one to predict")
    if max_tokens is not None and max_tokens < window:
        raise InputError(f"max_tokens is {max_tokens}, less than one window of {window}: raise it")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    count = len(ids) // window
    if count == 0:
        raise InputError(f"the text has {len(ids)} tokens, less than one window of {window}: give more text")
    return torch.tensor(ids[: count * window], dtype=torch.int64).view(count, window)
