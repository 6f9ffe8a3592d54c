"""Dtypes of plain numbers by the names that users, config.json and torch give them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tersor.errors import InputError, did_you_mean

FLOAT_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
"""The dtypes of activations and of scales that are plain numbers, by name."""


def float_dtype(name: str, choices: Iterable[str] = FLOAT_DTYPES) -> torch.dtype:
    """Return the dtype called `name`.

    Args:
        name: what the user wrote.
        choices: the keys of `FLOAT_DTYPES` that are allowed here.

    Raises:
        InputError: it is none of them.
    """
    known = tuple(choices)
    if name not in known:
        raise InputError(f"unknown dtype {name!r}{did_you_mean(name, known)}: use one of {', '.join(known)}")
    return FLOAT_DTYPES[name]


def float_dtype_or_auto(name: str) -> torch.dtype | None:
    """Return the dtype called `name`, or `None` for `auto`.

    Raises:
        InputError: it is neither.
    """
    return None if name == "auto" else float_dtype(name, ("auto", *FLOAT_DTYPES))


def dtype_name(dtype: torch.dtype) -> str:
    """Return what torch and config.json call a dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
