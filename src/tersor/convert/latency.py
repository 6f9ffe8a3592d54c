"""How long do the products of a model take, by our own kernels' costs? The one place that knows what a mix is to run.

Nothing is measured here: `kernels.tune` predicts each launch from what tiles cost on a chip (`kernels/tune/costs`), as
it does where a tile is chosen. What is counted are the products with weights that get levels, in one step of so many
rows: no attention, norms, routing or output head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tersor.compress.allocation import Fused
from tersor.errors import InputError
from tersor.formats import Activations, Mix
from tersor.hardware import Chip
from tersor.kernels import tune
from tersor.kernels.tune import experts as tune_experts
from tersor.kernels.tune.forecast import experts_seconds, linear_seconds
from tersor.layouts.packing import Packing, target_of, unsupported_reason

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")


class Steps:
    """Predicts products of steps of some rows, with 16-bit activations: a `compress.allocate_time.Clock`.

    Attributes:
        words: what is predicted.
    """

    def __init__(self, mix: Mix, chip: Chip, rows: int, dtype: torch.dtype, top_k: int | None = None) -> None:
        """Take what runs where.

        Args:
            mix: the levels.
            chip: the GPU.
            rows: of a step.
            dtype: of activations; others than float16 count as bfloat16.
            top_k: experts of a token; of `None` there are none.

        Raises:
            InputError: a level, or so many rows, have no kernel on the chip.
        """
        target = target_of(Activations.NATIVE, dtype) or "bfloat16"
        for level in mix.levels:
            why = unsupported_reason(level, target)
            if why:
                raise InputError(f"level {level.key()} has no kernel whose time could be predicted: {why}")
        self._packings = [Packing.of(level, target) for level in mix.levels]
        self._chip, self._rows, self._top_k = chip, rows, top_k
        if not tune.fused(tune.LinearProblem.of(self._packings[0], (64, 128), rows), chip):
            raise InputError(f"{chip.name} has no kernel for steps of {rows} rows whose time could be predicted")
        self.words = f"a step of {rows} row{'s' * (rows > 1)} on {chip.name}"

    def layer(self, layer: Fused, rows: Sequence[int]) -> float:
        """Return the seconds of the products of one layer with so many rows of each level, of one copy.

        Raises:
            InputError: it is one of experts, and nothing says how many a token has.
        """
        if layer.experts:
            sets = self._of_experts(layer, rows)
            ups, downs = ((), sets) if layer.second else (sets, ())
            return experts_seconds(ups, downs, self._chip)
        problems = tuple(
            tune.LinearProblem.of(packing, (count, layer.ic), self._rows)
            for packing, count in zip(self._packings, rows, strict=True)
        )
        return linear_seconds(problems, self._chip)

    def total(self, layers: Sequence[Fused], rows: Sequence[Sequence[int]]) -> float:
        """Return the seconds of all layers; both products of experts are predicted together, as their tiles agree."""
        found = 0.0
        experts: dict[str, dict[bool, tune_experts.Problems]] = {}
        for layer, own in zip(layers, rows, strict=True):
            if layer.experts:
                experts.setdefault(layer.experts, {})[layer.second] = self._of_experts(layer, own)
            else:
                found += self.layer(layer, own)
        for sides in experts.values():
            ups, downs = sides.get(False, ()), sides.get(True, ())
            found += experts_seconds(ups, downs, self._chip)
        return found

    def _of_experts(self, layer: Fused, rows: Sequence[int]) -> tune_experts.Problems:
        if self._top_k is None:
            raise InputError(
                f"config.json does not say how many experts of {layer.experts} a token has: leave them out"
            )
        return tuple(
            tune_experts.ExpertsProblem.of(packing, (layer.copies, count, layer.ic), self._rows, self._top_k)
            for packing, count in zip(self._packings, rows, strict=True)
            if count
        )


def top_k_of(config: object) -> int | None:
    """Return how many experts a token has by a config of transformers, `None` where it does not say."""
    found = (getattr(config, name, None) for name in _TOP_K)
    return next((count for count in found if isinstance(count, int)), None)
