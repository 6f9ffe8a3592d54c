"""How a measurement asks for launches other than the usual ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from tersor.kernels.tune import LinearConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """What fused kernels are launched with.

    Attributes:
        config: one of the problem's `tune.candidates`; `None` lets `tune.choose` choose.
        early: whether weights may be fetched before the kernel ahead has ended (programmatic dependent launch), where
            that kernel cannot have written them; without it every launch waits for the one before.
    """

    config: LinearConfig | None = None
    early: bool = True


_USUAL = Launches()
_asked: ContextVar[Launches] = ContextVar("tersor_launches", default=_USUAL)
current = _asked.get
"""Return what is asked for in this thread."""


@contextlib.contextmanager
def launches(*, config: LinearConfig | None = None, early: bool = True) -> Iterator[None]:
    """Launch fused kernels of this thread as asked; meant for measurements and tests, with calls of one problem."""
    token = _asked.set(Launches(config=config, early=early))
    try:
        yield
    finally:
        _asked.reset(token)
