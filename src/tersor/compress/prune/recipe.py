"""One entry to pruning: a mask by an algorithm, the best weights for it, and their codes in any scheme.

Every step is judged by the layer's loss tr((W - T) H (W - T)^T), T the weights wanted: those that there were, moved
half the way to the original model's outputs where calibration summed up how its inputs differ (`compress.gptq`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from tersor.compress.gptq import check_statistics, choice_of, encoded_of, propagated
from tersor.compress.grid import Grid
from tersor.compress.hessian import INPUT_DAMPING, Hessian, exact_products
from tersor.compress.prune.admm import admm_mask
from tersor.compress.prune.masks import magnitude_mask, wanda_mask
from tersor.compress.prune.pattern import Pattern
from tersor.compress.prune.reweight import loss_of, reweight
from tersor.compress.prune.sparsegpt import sparsegpt_mask
from tersor.compress.refine import Layer
from tersor.compress.rtn import quantize_rtn
from tersor.compress.statistics import HESSIAN, SHIFT
from tersor.errors import InputError, NonFiniteError, did_you_mean
from tersor.formats import Encoded, Objective, Scheme

Masked: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A mask, bool [OC, IC], and the weights that stay, float32 [OC, IC], zero elsewhere."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A way to choose which weights stay.

    Attributes:
        mask: returns mask and weights for (weights wanted, statistic `HESSIAN`, the same as a `Hessian`, pattern).
        summary: what it does, in the past tense: `pruned by magnitude`.
        scope: where the share of zeros holds unless something else is asked for.
        needs_text: whether it asks what the layer reads; the others take weights alone.
    """

    mask: Callable[[torch.Tensor, torch.Tensor, Hessian, Pattern], Masked]
    summary: str
    scope: str = "layer"
    needs_text: bool = True


def _plain(rows: torch.Tensor, kept: torch.Tensor) -> Masked:
    return kept, rows.where(kept, 0.0)


def _sparsegpt(rows: torch.Tensor, moments: torch.Tensor, _: Hessian, pattern: Pattern) -> Masked:
    return sparsegpt_mask(rows, Hessian.of(moments, INPUT_DAMPING, HESSIAN, as_they_come=True), pattern)


ALGORITHMS: dict[str, Algorithm] = {
    "magnitude": Algorithm(lambda w, _, h, p: _plain(w, magnitude_mask(w, p)), "pruned by magnitude", needs_text=False),
    "wanda": Algorithm(lambda w, _, h, p: _plain(w, wanda_mask(w, h, p)), "pruned by Wanda", "row"),
    "sparsegpt": Algorithm(_sparsegpt, "pruned by SparseGPT"),
    "admm": Algorithm(lambda w, _, h, p: admm_mask(w, h, p), "pruned by ADMM"),
}
"""Every algorithm by the name that `--algorithm` takes."""


def get_algorithm(name: str) -> Algorithm:
    """Return the algorithm called `name`.

    Raises:
        InputError: there is none.
    """
    if name not in ALGORITHMS:
        raise InputError(f"unknown algorithm {name!r}{did_you_mean(name, ALGORITHMS)} (known: {', '.join(ALGORITHMS)})")
    return ALGORITHMS[name]


@dataclass(frozen=True, slots=True)
class Pruned:
    """A weight with its zeros.

    Attributes:
        weight: [OC, IC] in the dtype of the source, or where there are codes in float32 what they decode to; zero where
            `kept` is false.
        kept: bool [OC, IC], the mask.
        encoded: codes and scales, where a scheme was asked for; masked weights decode to zero.
        losses: name of a step -> the layer's loss behind it: `magnitude`, of the largest weights as they are, for
            comparison; `mask`; `reweighted`; `quantized`.
        squared_error: sum over all weights of (w - w as it was)^2.
        squared_norm: sum over all weights as they were of w^2.
    """

    weight: torch.Tensor
    kept: torch.Tensor
    encoded: Encoded | None
    losses: dict[str, float]
    squared_error: float
    squared_norm: float


def prune(
    weight: torch.Tensor,
    pattern: Pattern,
    algorithm: str,
    statistics: Mapping[str, torch.Tensor],
    *,
    scheme: Scheme | None = None,
    update: bool = True,
    allowed: torch.Tensor | None = None,
) -> Pruned:
    """Prune a whole weight against the statistics of its layer.

    Args:
        weight: [OC, IC], float16, bfloat16 or float32, any device.
        pattern: which masks are allowed.
        algorithm: a key of `ALGORITHMS`.
        statistics: `HESSIAN`, and `SHIFT` where it was summed up; moved to the weight's device. Empty where there are
            none: then the largest weights stay as they are, or on their nearest codes.
        scheme: of the weights that stay; `None` keeps the weight's dtype.
        update: whether the weights that stay are moved to the best ones for their mask; without, they are what the
            algorithm itself makes of them: SparseGPT's own updates, and elsewhere the weights as they were.
        allowed: bool [OC, IC], which weights may stay; the others are zero whatever the pattern keeps.

    Returns:
        The weight. No step behind the mask makes the loss larger, and a mask that loses more than that of the largest
        weights, both with their best weights, gives way to it.

    Raises:
        NonFiniteError, FormatError, ScaleError: as `quantize_rtn`.
        InputError: statistics of another shape, not finite, or not second moments; none, and they are needed; no such
            algorithm.
    """
    chosen = get_algorithm(algorithm)
    _check_finite(weight)
    if not statistics:
        if chosen.needs_text or update:
            raise InputError(f"{algorithm!r}, and fitting weights to a mask, need statistics of what the layer reads")
        return _alone(weight, pattern, scheme, allowed)
    statistics = {name: statistic.to(weight.device) for name, statistic in statistics.items()}
    check_statistics(weight, statistics)
    with exact_products(), torch.no_grad():
        moments = statistics[HESSIAN]
        hessian = Hessian.of(moments, INPUT_DAMPING, HESSIAN)
        original = weight.float()
        rows = target = original if allowed is None else original.where(allowed, 0.0)
        if update and SHIFT in statistics:
            target = rows + propagated(rows, statistics[SHIFT], hessian)

        def loss(found: torch.Tensor) -> float:
            return float(loss_of(found, target, hessian).sum()) * hessian.unit

        plain = _plain(rows, _within(magnitude_mask(rows, pattern), allowed))
        losses = {"magnitude": loss(plain[1])}
        kept, found = chosen.mask(target, moments, hessian, pattern)
        kept = _within(kept, allowed)
        found = found.where(kept, 0.0)
        if not update and algorithm == "admm":
            found = rows.where(kept, 0.0)
        losses["mask"] = loss(found)
        if update:
            found = reweight(found, kept, target, hessian)
            losses["reweighted"] = loss(found)
            if not losses["reweighted"] <= losses["magnitude"]:
                kept, found = plain[0], reweight(plain[1], plain[0], target, hessian)
                losses["reweighted"] = loss(found)
        encoded = None
        if scheme is not None:
            encoded = _quantized(weight, found, kept, target if update else found, hessian, scheme)
            result = encoded.dequantize()
            losses["quantized"] = loss(result)
        else:
            result = found.where(kept, 0.0).to(weight.dtype)
        return _pruned(original, result, kept, encoded, losses)


def _alone(weight: torch.Tensor, pattern: Pattern, scheme: Scheme | None, allowed: torch.Tensor | None) -> Pruned:
    """Keep the largest weights, whatever the layer reads."""
    original = weight.float()
    kept, found = _plain(original, _within(magnitude_mask(original, pattern), allowed))
    result = found.to(weight.dtype)
    if scheme is None:
        return _pruned(original, result, kept, None, {})
    encoded = quantize_rtn(result, scheme)
    return _pruned(original, encoded.dequantize(), kept, encoded, {})


def _pruned(
    original: torch.Tensor,
    result: torch.Tensor,
    kept: torch.Tensor,
    encoded: Encoded | None,
    losses: dict[str, float],
) -> Pruned:
    error = (result.float() - original).double().square_().sum()
    return Pruned(result, kept, encoded, losses, float(error), float(original.double().square_().sum()))


def _within(kept: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    return kept if allowed is None else kept & allowed


def _check_finite(weight: torch.Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        row, column = (int(axis) for axis in (~torch.isfinite(weight)).nonzero()[0])
        raise NonFiniteError((row, column), float(weight[row, column]))


def _quantized(
    weight: torch.Tensor,
    found: torch.Tensor,
    kept: torch.Tensor,
    target: torch.Tensor,
    hessian: Hessian,
    scheme: Scheme,
) -> Encoded:
    """Choose codes for the weights that stay as `compress.gptq` does, those that do not being zero throughout."""
    nearest = quantize_rtn(found.to(weight.dtype), scheme)
    layer = Layer.of(Grid.of(scheme, weight.shape[1], weight.dtype, weight.device), hessian, kept)
    wanted, aimed = layer.columns(found), layer.columns(target)
    start = layer.judge(aimed, choice_of(nearest, layer))
    rounded = layer.judge(aimed, layer.round(wanted).choice)
    best = layer.polish(aimed, start.better(rounded))
    choice = replace(best.choice, values=best.choice.values.where(layer.columns(kept), 0.0))  # no zero has a sign
    unit = hessian.unit
    objective = Objective(float(start.loss.sum()) * unit, float(best.loss.sum()) * unit)
    return encoded_of(weight, nearest, layer, choice, objective)
