"""Which errors does a user meet? Every message is one line: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TersorError(Exception):
    """A failure that is not the caller's fault (disk full, a kernel that does not launch): exit status 1."""

    exit_status = 1


class InputError(TersorError, ValueError):
    """Bad usage or bad input (a wrong option, a broken checkpoint): exit status 2."""

    exit_status = 2


class FormatError(InputError):
    """A numeric format or scheme that does not exist or does not fit the tensor."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read: missing, truncated, or not what it says it is."""


class ShapeError(InputError):
    """A tensor whose shape, dtype or device is not what the operation takes."""


class OutputError(TersorError):
    """Output that cannot be written (disk full, permission)."""


class KernelError(TersorError):
    """A kernel that does not compile, load or launch; carries the compiler's or driver's words."""


class UnsupportedError(TersorError):
    """Something this machine or installation lacks (no GPU, an optional package)."""


class LostError(TersorError):
    """A process that computes a part of a model is gone, so that nothing can be computed any more."""


class NonFiniteError(InputError):
    """A NaN or infinity in a weight; `index` is its position in the tensor handed in."""

    def __init__(self, index: tuple[int, ...], value: float, tensor: str = "weight") -> None:
        self.index = index
        self.value = value
        super().__init__(f"{tensor} holds {value} at {list(index)}: repair the checkpoint before compressing it")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `", did you mean 'x'?"` for the nearest of `choices`, or an empty string."""
    lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.5)
    return f", did you mean {lower[near[0]]!r}?" if near else ""


def one_line(error: Exception) -> str:
    """Return the kind and the first line of an error of another library, for a message of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
