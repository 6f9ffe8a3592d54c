"""What does an output feature of a layer's experts lose at every level? A sum over experts, by the tokens each sees.

A block computes its experts in one module, so gradients inside of one are made here: of the module's output, times what
the router multiplies an expert's output by, back through down and the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tersor.compress.salience import Salience, rounding_error
from tersor.convert.calibrate.gradients import Take
from tersor.convert.calibrate.inputs import ExpertInputs
from tersor.errors import NonFiniteError
from tersor.formats import Mix
from tersor.nn.experts import Rows

_DELTA_BYTES = 16 << 30
"""Bytes of rounding errors in memory at once: where those of all experts take more, blocks run several times."""


@dataclass(frozen=True, slots=True)
class _Errors:
    """The rounding errors of an expert's weights, one [OC, IC] a level; of a weight that gets no levels none."""

    inner: list[torch.Tensor]
    outer: list[torch.Tensor]


class ExpertScores:
    """Sums of the scores of a layer's experts.

    Attributes:
        together: numbers of experts whose rounding errors are in memory at once: a block runs once for each.
    """

    def __init__(self, module: Any, mix: Mix, wanted: Sequence[str], device: torch.device) -> None:
        """Start with sums of nothing.

        Args:
            module: the experts, as transformers has them, with their weights.
            mix: the levels.
            wanted: `in`, `down` or both.
            device: where the block computes.
        """
        self._inside, self._mix = ExpertInputs(module, "down"), mix
        form, count = self._inside.form, len(mix.levels)
        width = form.shape(form.fused)[1]
        self._sums = {part: Salience(count, width if part == "in" else form.hidden, device=device) for part in wanted}
        size = max(1, _DELTA_BYTES // (4 * count * form.inner * form.hidden * (3 if form.gated else 2)))
        self.together = [range(first, min(first + size, form.count)) for first in range(0, form.count, size)]

    def take(self, chosen: range) -> Take:
        """Return what takes what the module is called with, and the gradient of its output, for some experts.

        Raises:
            NonFiniteError: a weight holds a NaN or an infinity; its index begins with the expert.
            FormatError: as `rounding_error` does.
        """
        errors = {expert: self._errors(expert) for expert in chosen}

        def add(given: list[torch.Tensor], gradient: torch.Tensor) -> None:
            for expert, own in errors.items():
                self._add(expert, given, gradient, own)
            if 0 in errors:
                for total in self._sums.values():
                    total.saw(self._inside.tokens(given))

        return add

    def mean(self) -> dict[str, torch.Tensor]:
        """Return the part of the weights -> what each output feature loses at each level, in nats a token."""
        return {part: total.mean() for part, total in self._sums.items()}

    def _errors(self, expert: int) -> _Errors:
        try:
            made = [
                [rounding_error(weight.float(), scheme) for scheme in self._mix.levels] if part in self._sums else []
                for part, weight in (("in", self._gate_up(expert)), ("down", self._inside.weight(expert, "down_proj")))
            ]
        except NonFiniteError as error:
            raise NonFiniteError((expert, *error.index), error.value) from None
        return _Errors(*made)

    def _gate_up(self, expert: int) -> torch.Tensor:
        """Return gate and up of an expert, the gate first, where its rows are known."""
        form = self._inside.form
        weight = self._inside.weight(expert, form.fused)
        return weight if form.rows is Rows.PLAIN else torch.cat(form.rows.halves(weight[None]), dim=1)[0]

    def _add(self, expert: int, given: list[torch.Tensor], gradient: torch.Tensor, errors: _Errors) -> None:
        """Add what one expert's tokens of a batch say."""
        inside, form = self._inside, self._inside.form
        rows = inside.rows(given, expert)
        if not len(rows):
            return
        outer = gradient.reshape(-1, form.hidden)[rows] * inside.factors(given, expert, rows)[:, None]
        both = inside.both(given, expert, rows).requires_grad_(True)
        with torch.enable_grad():
            inner = inside.activated(both)
            (own,) = torch.autograd.grad(inner, both, outer.to(inner.dtype) @ inside.weight(expert, "down_proj"))
        if "in" in self._sums:
            x = given[0].reshape(-1, form.hidden)[rows]
            if form.rows is not Rows.PLAIN:
                own = torch.cat([half[0].T for half in form.rows.halves(own.T[None])], dim=1)
            self._sums["in"].add(x, own, errors.inner, tokens=0)
        if "down" in self._sums:
            self._sums["down"].add(inner.detach(), outer, errors.outer, tokens=0)
