"""Below which divergence can nothing be said? A model against itself, with one rounding that does not change it.

Which rounding depends on the dtype that the model computes in. In float32, the inputs of its linear products are
rounded to bfloat16, as every server that computes in bfloat16 rounds them. In a 16-bit dtype the roundings are there
already, so the other side is the same weights computed in float32. A method whose divergence is not clearly above that
of this pair differs from the original by no more than the arithmetic that the original is served with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tersor import ops  # noqa: F401  (defines tersor::linear and its kin)
from tersor.evaluate.predictors import Predictor

ROUNDED = torch.bfloat16
"""What inputs of products are rounded to."""

_INPUT_OF = {"aten::linear": 0, "aten::matmul": 0, "aten::mm": 0, "aten::addmm": 1}
"""Operator of torch that multiplies rows of activations with a weight -> which argument the rows are."""


class _Rounding(TorchDispatchMode):
    """Rounds the rows that linear products get; batched products, of attention and positions, stay as they are."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        place = _rows_of(func._schema, args)
        if place is not None and args[place].is_floating_point():
            rounded = args[place].to(ROUNDED).to(args[place].dtype)
            args = (*args[:place], rounded, *args[place + 1 :])
        return func(*args, **(kwargs or {}))


def _rows_of(schema: Any, args: tuple[Any, ...]) -> int | None:
    """Return which argument of an operator is rows that a weight multiplies, `None` where there are none.

    Operators of Tersor call such rows `x`, whatever the kind of weight.
    """
    if schema.name.startswith("tersor::"):
        return 0 if schema.arguments[0].name == "x" else None
    if schema.name == "aten::matmul" and args[1].dim() != 2:
        return None
    return _INPUT_OF.get(schema.name)


@dataclass(frozen=True, slots=True)
class RoundedInputs:
    """A model whose linear products get their inputs rounded to `ROUNDED`; its weights and sums stay as they are.

    Attributes:
        model: that it is otherwise.
    """

    model: Predictor

    @property
    def vocabulary(self) -> int:
        """Return how many tokens the model has rows for."""
        return self.model.vocabulary

    @property
    def positions(self) -> int | None:
        """Return how many tokens a window may have."""
        return self.model.positions

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations, which are rounded where a product reads them alone."""
        return self.model.dtype

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [T, V] of a window int64 [T], in the model's dtype."""
        with _Rounding():
            return self.model.logits(tokens)

    def not_finite(self, tokens: torch.Tensor) -> str:
        """Return which part of the model, without the rounding, is the first not to be finite."""
        return self.model.not_finite(tokens)
