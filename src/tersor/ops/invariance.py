"""Batch-invariant mode: a token's result has the same bits however many other tokens share its call.

Off by default, since the fastest order of sums depends on the number of tokens. It holds for the whole process: a model
is invariant only if all of its layers are. Attention and other operators are not Tersor's and have modes of their own.
"""

from __future__ import annotations

from tersor import settings

_asked: bool | None = None
"""What was set or read from the environment; `None` before the first question."""


def set_batch_invariant(on: bool) -> None:
    """Turn batch-invariant linears on or off, whatever TERSOR_BATCH_INVARIANT says.

    CUDA graphs that were captured before keep the mode they were captured in.
    """
    global _asked
    _asked = bool(on)


def batch_invariant() -> bool:
    """Tell whether linears are batch-invariant: as set, else as TERSOR_BATCH_INVARIANT says."""
    return _read() if _asked is None else _asked


def forget() -> None:
    """Read TERSOR_BATCH_INVARIANT anew at the next question."""
    global _asked
    _asked = None


def _read() -> bool:
    set_batch_invariant(settings.get("TERSOR_BATCH_INVARIANT") == "1")
    return batch_invariant()
