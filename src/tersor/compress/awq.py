"""Scales of input channels, so that channels with loud inputs lose less when weights are rounded.

As AWQ does (arXiv 2306.00978): a channel of the weight is multiplied with a power of how loud its inputs are, and its
inputs are divided by that where they are made. The exponent is searched by what the layers that read these inputs lose
with codes of the recipe itself: for round to nearest other scales are best than for a recipe that lets later channels
make up for the errors of those before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tersor.compress.encode import DEFAULT_RECIPE, encode, get_recipe
from tersor.compress.hessian import exact_products
from tersor.compress.statistics import HESSIAN
from tersor.errors import FormatError
from tersor.formats import Assignment, Scheme

EXPONENTS = tuple(step / 20 for step in range(1, 21))
"""What is tried beside 0, which changes nothing; every second one by a recipe that takes its time."""

_SAMPLE = 256
"""Rows of a weight by which such a recipe is tried."""
_PATIENCE = 2
"""Exponents without a gain after which larger ones are not tried with it."""
_LEAST_GAIN = 0.01
"""Of the loss: what gains less is left as it is."""
_QUIETEST = 1e-4
"""What inputs of a channel count at least, relative to their mean: a dead channel would be scaled without an end."""


@dataclass(frozen=True, slots=True)
class Scales:
    """What a search found.

    Attributes:
        scales: float32 [C], what weights of each channel are multiplied with, and its inputs divided by.
        exponent: of the channel's loudness; 0 where nothing is gained.
        before, after: what all layers lose without scales, and with these.
    """

    scales: torch.Tensor
    exponent: float
    before: float
    after: float


class Readers:
    """The layers that read the same inputs, and what rounding them costs."""

    def __init__(
        self,
        layers: Sequence[tuple[torch.Tensor, Scheme | Assignment]],
        hessian: torch.Tensor,
        source: torch.Tensor | None = None,
        *,
        recipe: str = DEFAULT_RECIPE,
    ) -> None:
        """Prepare the search.

        Args:
            layers: weight [OC, IC] of each, and how it is represented.
            hessian: second moments of the inputs, [IC, IC].
            source: int64 [IC], which of C channels each input channel is made of; each of its own by default.
            recipe: a key of `compress.RECIPES`; one that needs the Hessian is tried by some rows of every layer.
        """
        self._recipe, self._slow = recipe, bool(get_recipe(recipe).needs)
        self._hessian = hessian.float()
        self._layers = [part for weight, form in layers for part in _of_one_scheme(weight.float(), form, self._slow)]
        ic = len(hessian)
        self._source = torch.arange(ic, device=hessian.device) if source is None else source.to(hessian.device)
        energy = torch.zeros(int(self._source.max()) + 1, dtype=torch.float32, device=hessian.device)
        energy.index_add_(0, self._source, self._hessian.diagonal().clamp_min(0))
        self._loudness = (energy / torch.bincount(self._source).clamp_min(1)).sqrt()

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """Return the scale of every input channel, [IC], of scales [C]."""
        return scales[self._source]

    def loss(self, scales: torch.Tensor) -> float:
        """Return tr(E H E^T), E the error of all weights with scales [C]; infinite where a scale fits no dtype."""
        columns, total = self.spread(scales), 0.0
        statistics = {HESSIAN: self._hessian / columns[:, None] / columns} if self._slow else {}
        for weight, scheme, share in self._layers:
            scaled = weight * columns
            try:
                error = (encode(scaled, scheme, self._recipe, statistics).dequantize() - scaled) / columns
            except FormatError:
                return math.inf
            with exact_products():
                total += float(((error @ self._hessian) * error).sum(dtype=torch.float64)) / share
        return total

    def search(self) -> Scales:
        """Return the scales that lose least, of all exponents; those of exponent 0 where none gains a hundredth."""
        floor = _QUIETEST * self._loudness.mean()
        one = torch.ones_like(self._loudness)
        before = self.loss(one)
        best, vain = Scales(one, 0.0, before, before), 0
        for exponent in (EXPONENTS[1::2] if self._slow else EXPONENTS) if bool(floor > 0) else ():
            scales = self._loudness.clamp_min(floor).pow(exponent)
            scales = scales / (scales.max() * scales.min()).sqrt()
            loss = self.loss(scales)
            vain = 0 if loss < best.after else vain + 1
            if not vain:
                best = Scales(scales, exponent, before, loss)
            elif self._slow and vain == _PATIENCE:
                break
        return best if best.after <= (1 - _LEAST_GAIN) * before else Scales(one, 0.0, before, before)


def _of_one_scheme(
    weight: torch.Tensor, form: Scheme | Assignment, sampled: bool
) -> Iterator[tuple[torch.Tensor, Scheme, float]]:
    """Yield rows of a weight that have one scheme, the scheme, and the share that they are of all that have it."""
    if isinstance(form, Scheme):
        parts = [(form, torch.arange(len(weight)))]
    else:
        level = torch.tensor(list(form.level))
        parts = [(scheme, (level == number).nonzero().flatten()) for number, scheme in enumerate(form.mix.levels)]
    for scheme, rows in parts:
        taken = rows[:: max(1, len(rows) // _SAMPLE)] if sampled else rows
        if len(taken):
            yield weight[taken.to(weight.device)], scheme, len(taken) / len(rows)
