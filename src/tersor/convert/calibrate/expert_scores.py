"""What does an output feature of a layer's experts lose at every level? A sum over experts, by the tokens each sees.

A block computes its experts in one module, so gradients inside of one are made here: of the module's output, times what
the router multiplies an expert's output by, back through down and the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tersor.compress.salience import Salience, rounding_error
from tersor.convert.calibrate.inputs import ExpertInputs
from tersor.errors import NonFiniteError
from tersor.formats import Mix
from tersor.nn.experts import Rows

_DELTA_BYTES = 16 << 30
"""Bytes of rounding errors in memory at once: where those of all experts take more, blocks run several times."""

Visit = Callable[[Callable[[list[torch.Tensor], torch.Tensor], None]], None]
"""Runs the block forward and backward, and hands over what its experts are called with, and the output's gradient."""


@dataclass(frozen=True, slots=True)
class _Errors:
    """The rounding errors of an expert's weights, one [OC, IC] a level; of a weight that gets no levels none."""

    inner: list[torch.Tensor]
    outer: list[torch.Tensor]


def score_experts(
    module: Any, mix: Mix, wanted: Sequence[str], visit: Visit, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return what each output feature loses at each level, in nats a token: the part of its weight -> [levels, OC].

    Args:
        module: the experts, as transformers has them, with their weights.
        mix: the levels.
        wanted: `in`, `down` or both.
        visit: of the block.
        device: where it computes.

    Raises:
        NonFiniteError: a weight holds a NaN or an infinity; its index begins with the expert.
        FormatError: as `rounding_error` does.
    """
    inside = ExpertInputs(module, "down")
    form, count = inside.form, len(mix.levels)
    width = form.shape(form.fused)[1]
    sums = {
        part: Salience(count, width if part == "in" else form.hidden, device=device)
        for part in ("in", "down")
        if part in wanted
    }
    each = 4 * count * form.inner * form.hidden * (3 if form.gated else 2)
    together = max(1, _DELTA_BYTES // each)
    for first in range(0, form.count, together):
        chosen = range(first, min(first + together, form.count))
        errors = {expert: _errors(inside, expert, mix, wanted) for expert in chosen}

        def add(given: list[torch.Tensor], gradient: torch.Tensor, errors: dict[int, _Errors] = errors) -> None:
            for expert, own in errors.items():
                _add(inside, expert, given, gradient, own, sums)
            if 0 in errors:
                for total in sums.values():
                    total.saw(inside.tokens(given))

        visit(add)
    return {part: total.mean() for part, total in sums.items()}


def _errors(inside: ExpertInputs, expert: int, mix: Mix, wanted: Sequence[str]) -> _Errors:
    try:
        made = [
            [rounding_error(weight.float(), scheme) for scheme in mix.levels] if part in wanted else []
            for part, weight in (("in", _ordered(inside, expert)), ("down", inside.weight(expert, "down_proj")))
        ]
    except NonFiniteError as error:
        raise NonFiniteError((expert, *error.index), error.value) from None
    return _Errors(*made)


def _ordered(inside: ExpertInputs, expert: int) -> torch.Tensor:
    """Return gate and up of an expert, the gate first, where its rows are known."""
    weight = inside.weight(expert, inside.form.fused)
    return weight if inside.form.rows is Rows.PLAIN else torch.cat(inside.form.rows.halves(weight[None]), dim=1)[0]


def _add(
    inside: ExpertInputs,
    expert: int,
    given: list[torch.Tensor],
    gradient: torch.Tensor,
    errors: _Errors,
    sums: dict[str, Salience],
) -> None:
    """Add what one expert's tokens of a batch say."""
    rows = inside.rows(given, expert)
    if not len(rows):
        return
    form = inside.form
    outer = gradient.reshape(-1, form.hidden)[rows] * inside.factors(given, expert, rows)[:, None]
    both = inside.both(given, expert, rows).requires_grad_(True)
    with torch.enable_grad():
        inner = inside.activated(both)
        (own,) = torch.autograd.grad(inner, both, outer.to(inner.dtype) @ inside.weight(expert, "down_proj"))
    if "in" in sums:
        x = given[0].reshape(-1, form.hidden)[rows]
        if form.rows is not Rows.PLAIN:
            own = torch.cat([half[0].T for half in form.rows.halves(own.T[None])], dim=1)
        sums["in"].add(x, own, errors.inner, tokens=0)
    if "down" in sums:
        sums["down"].add(inner.detach(), outer, errors.outer, tokens=0)
