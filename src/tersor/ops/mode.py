"""How do linears run now? One value of the process, which an engine, a measurement or a test overrides for its calls.

Batch-invariant: a token's result has the same bits however many other tokens share its call. That is off by default,
since the fastest order of sums depends on the number of tokens; a model is invariant only if all of its layers are.
Attention over pages (`ops.attend`) follows it; other operators are not Tersor's and have modes of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from tersor import settings
from tersor.kernels.tune import LinearConfig
from tersor.kernels.tune.mixed import MixedConfig
from tersor.kernels.tune.sparse import SparseConfig
from tersor.ops.workspace import SHARED, Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How linears run.

    Attributes:
        reference: whether the reference serves every call (`TERSOR_KERNEL=reference`).
        batch_invariant: whether a token's result must not depend on the other tokens (`TERSOR_BATCH_INVARIANT=1`).
        config: configuration of every fused kernel, one of its problem's `tune.candidates`, for measurements; `None`
            lets `tune.choose` choose.
        mixed: likewise of every kernel that takes all row sets of a mixed weight.
        sparse: likewise of every kernel that multiplies a pruned weight.
        early: whether weights may be fetched before the kernel ahead has ended (programmatic dependent launch), where
            that kernel cannot have written them; otherwise every launch waits for the one before.
        fold_norms: whether a decoder's norms are part of the products around them where kernels have that
            (`TERSOR_FOLD_NORMS=0` if not); otherwise each is a kernel of its own.
        workspace: device memory that launches borrow.
        key: what of all this decides who serves a call.
    """

    reference: bool = False
    batch_invariant: bool = False
    config: LinearConfig | None = None
    mixed: MixedConfig | None = None
    sparse: SparseConfig | None = None
    early: bool = True
    fold_norms: bool = True
    workspace: Workspace = SHARED
    key: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", 2 * self.reference + self.batch_invariant)


_process: Mode | None = None
"""The mode of whoever asks for no other; `None` before the first question and after `forget`."""
_asked: ContextVar[Mode | None] = ContextVar("tersor_mode", default=None)


def current() -> Mode:
    """Return the mode that holds here: that of the innermost `using`, else the process's."""
    return _asked.get() or _process or _read()


def _read() -> Mode:
    """Read the environment, which costs as much as a launch, once."""
    global _process
    _process = replace(_of_kernels(), batch_invariant=settings.get("TERSOR_BATCH_INVARIANT") == "1")
    return _process


def _of_kernels() -> Mode:
    reference, folds = settings.get("TERSOR_KERNEL") == "reference", settings.get("TERSOR_FOLD_NORMS") == "1"
    return Mode(reference=reference, fold_norms=folds)


def forget() -> None:
    """Read the environment anew at the next question; what `set_batch_invariant` said is gone, too."""
    global _process
    _process = None


@contextlib.contextmanager
def using(**changes: Any) -> Iterator[Mode]:
    """Run the linears of this thread (or task) in another mode, such as `using(batch_invariant=True)`.

    Args:
        changes: fields of `Mode`; the others stay as they are here.
    """
    chosen = replace(current(), **changes)
    token = _asked.set(chosen)
    try:
        yield chosen
    finally:
        _asked.reset(token)


def set_batch_invariant(on: bool) -> None:
    """Turn batch-invariant linears on or off for the process, whatever TERSOR_BATCH_INVARIANT says.

    CUDA graphs that were captured before keep the mode they were captured in, and so does who runs inside `using`.
    """
    global _process
    _process = replace(_process or _of_kernels(), batch_invariant=bool(on))


def batch_invariant() -> bool:
    """Tell whether linears are batch-invariant here."""
    return current().batch_invariant
