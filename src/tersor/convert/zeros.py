"""Which zeros, and which values between them, does a user ask for? Read and checked before a model is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tersor.checkpoint.config import check_pattern, finds, parse_scheme
from tersor.compress.prune import Pattern, get_algorithm
from tersor.errors import InputError
from tersor.formats import Plain, Sparse, plain_values
from tersor.layouts.tiled_sparse import tiles_reason

DEAD_NEURONS = ("report", "drop")
"""What can be done about MLP units that never fire on the calibration text."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Which zeros are asked for.

    Attributes:
        usual: of every layer that no override finds.
        overrides: (regular expression of modules, their pattern); the first that finds a module decides.
    """

    usual: Pattern
    overrides: tuple[tuple[str, Pattern], ...]

    @staticmethod
    def parse(sparsity: Any, block: str, scope: str, overrides: Sequence[str]) -> Asked:
        """Return what options mean.

        Args:
            sparsity, block, scope: as `Pattern.parse` takes them.
            overrides: `REGEX=SPARSITY[:n:m][:row|:layer]`.

        Raises:
            InputError: one of them means nothing, or a share is out of reach; it is named.
        """
        usual = Pattern.parse(sparsity, block, scope)
        found: dict[str, Pattern] = {}
        for text in overrides:
            pattern, separator, value = text.rpartition("=") if isinstance(text, str) else ("", "", "")
            if not separator or not pattern or not value:
                raise InputError(f"override {text!r} is not REGEX=SPARSITY, such as 'down_proj=0.3'")
            if check_pattern(pattern, "override") in found:
                raise InputError(f"override {pattern!r} stands there twice: keep one of them")
            share, *details = value.split(":")
            own = details.pop() if details and details[-1] in ("row", "layer") else scope
            try:
                found[pattern] = Pattern.parse(share, ":".join(details) or block, own)
            except InputError as error:
                raise InputError(f"override {text!r}: {error}") from None
        return Asked(usual, tuple(found.items()))

    def of(self, names: Sequence[str]) -> Pattern:
        """Return the pattern of a module that has these names."""
        return next((pattern for regex, pattern in self.overrides if finds(regex, names)), self.usual)

    def identity(self) -> dict[str, Any]:
        """Return what was asked for, as JSON values."""
        return {"sparsity": self.usual.key(), "overrides": {regex: found.key() for regex, found in self.overrides}}


def check_without_text(
    algorithm: str, *, update: bool | None, allocate: bool, dead_neurons: str | None, tokens: bool
) -> None:
    """Check that nothing is asked for that only a calibration text can tell.

    Args:
        algorithm, update, allocate, dead_neurons: as `tersor.prune` takes them.
        tokens: whether tokens, a window or a seed is asked for.

    Raises:
        InputError: it is; it is named.
    """
    needs = {
        f"algorithm {algorithm!r}": get_algorithm(algorithm).needs_text,
        "fitting weights to a mask": bool(update),
        "allocating shares": allocate,
        "looking for dead neurons": dead_neurons is not None,
    }
    for what, there in needs.items():
        if there:
            raise InputError(f"{what} needs a text to calibrate on: add --calibration FILE")
    if tokens:
        raise InputError("calibration tokens, window and seed say nothing without a calibration text")


def parse_values(text: str | None, group_size: int | None, scale_dtype: str | None, dtype: str) -> Sparse:
    """Return what pruned weights are stored as.

    Args:
        text: `bf16`, `fp16`, `fp32` or such a dtype in full, or `FORMAT[:gN|:row][:SCALE_DTYPE]`; `None` is the model's
            dtype.
        group_size, scale_dtype: where a format names none.
        dtype: of the model.

    Raises:
        FormatError: there is no such format.
        InputError: groups or scales of values that have none.
    """
    plain = plain_values(dtype if text is None else text)
    if plain is None and text is not None:
        return Sparse(parse_scheme(text, group_size, scale_dtype, f"values {text!r}"))
    if (group_size, scale_dtype) != (None, None):
        raise InputError("group size and scale dtype are for values with codes, such as --values fp6")
    return Sparse(plain or Plain("float32"))


def unmultiplied(sparse: Sparse) -> str:
    """Return why no kernel multiplies with pruned weights of such values, or an empty string where one does.

    Without one every product decodes slices of the weight for cuBLAS.
    """
    own = sparse.values.dtype if isinstance(sparse.values, Plain) else ""
    return tiles_reason(sparse, own if own in ("float16", "bfloat16") else "float16")
