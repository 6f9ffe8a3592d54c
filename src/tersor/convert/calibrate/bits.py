"""The same bits every time: what a resumed run needs of the passes through a model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Have a GPU compute the same bits every time, where it has a way to."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    setting: Any = torch.utils.deterministic
    filled = setting.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    setting.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        setting.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def unwatched(device: torch.device) -> Iterator[None]:
    """Do without `deterministic` for a while, around what a GPU computes with the same bits anyway.

    That is true of products on one stream, of sums along an axis and of copies, which are all that choosing codes is
    made of. Inside `deterministic` torch has a warning for every product, which takes as long as its launch.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
