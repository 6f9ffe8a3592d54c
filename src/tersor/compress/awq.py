"""Scales of input channels, so that channels with loud inputs lose less when weights are rounded.

As AWQ does (arXiv 2306.00978): a channel of the weight is multiplied with a power of how loud its inputs are, and its
inputs are divided by that where they are made. The exponent is searched by what the layers that read these inputs lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tersor.compress.hessian import INPUT_DAMPING, Hessian, exact_products
from tersor.compress.salience import rounding_error
from tersor.compress.statistics import HESSIAN
from tersor.formats import Assignment, Scheme

EXPONENTS = tuple(step / 20 for step in range(1, 21))
"""What is tried beside 0, which changes nothing."""

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
        mended: bool = False,
    ) -> None:
        """Prepare the search.

        Args:
            layers: weight [OC, IC] of each, and how it is represented.
            hessian: second moments of the inputs, [IC, IC].
            source: int64 [IC], which of C channels each input channel is made of; each of its own by default.
            mended: whether the recipe makes up for the errors of channels by later ones, so that an error of a channel
                costs what GPTQ's search of scales takes for it, in place of tr(E H E^T).

        Raises:
            InputError: the Hessian is no sum of x x^T.
        """
        self._layers = [(weight.float(), form) for weight, form in layers]
        found = Hessian.of(hessian, INPUT_DAMPING, HESSIAN)
        self._unit = found.unit
        self._cost = found.weights() if mended else found.natural
        ic = len(hessian)
        self._source = torch.arange(ic, device=hessian.device) if source is None else source.to(hessian.device)
        energy = torch.zeros(int(self._source.max()) + 1, dtype=torch.float32, device=hessian.device)
        energy.index_add_(0, self._source, hessian.diagonal().float().clamp_min(0))
        self._loudness = (energy / torch.bincount(self._source).clamp_min(1)).sqrt()

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """Return the scale of every input channel, [IC], of scales [C]."""
        return scales[self._source]

    def loss(self, scales: torch.Tensor) -> float:
        """Return what rounding to nearest costs all layers with scales [C], in the units of the Hessian."""
        columns = self.spread(scales)
        total = 0.0
        with exact_products():
            for weight, form in self._layers:
                error = _rounding_error(weight * columns, form) / columns
                if self._cost.dim() == 1:
                    total += float(error.square_().sum(dim=0).double() @ self._cost.double())
                else:
                    total += float(((error @ self._cost) * error).sum(dtype=torch.float64))
        return total * self._unit

    def search(self) -> Scales:
        """Return the scales that lose least, of all exponents; those of exponent 0 where none is better."""
        floor = _QUIETEST * self._loudness.mean()
        one = torch.ones_like(self._loudness)
        before = self.loss(one)
        best = Scales(one, 0.0, before, before)
        if not bool(floor > 0):
            return best
        for exponent in EXPONENTS:
            scales = self._loudness.clamp_min(floor).pow(exponent)
            scales = scales / (scales.max() * scales.min()).sqrt()
            loss = self.loss(scales)
            if loss < best.after:
                best = Scales(scales, exponent, before, loss)
        return best


def _rounding_error(weight: torch.Tensor, form: Scheme | Assignment) -> torch.Tensor:
    """Return what rounding to nearest adds to a weight whose rows may have different schemes, float32 [OC, IC]."""
    if isinstance(form, Scheme):
        return rounding_error(weight, form)
    error = torch.empty_like(weight)
    level = torch.tensor(list(form.level), device=weight.device)
    for number, scheme in enumerate(form.mix.levels):
        rows = (level == number).nonzero().flatten()
        if len(rows):
            error[rows] = rounding_error(weight[rows], scheme)
    return error
