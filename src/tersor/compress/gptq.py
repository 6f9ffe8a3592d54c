"""GPTQ for every format, refined: the recipe `gptq`, which needs the second moments of a layer's inputs.

Codes are chosen to minimise the error of the layer's outputs, tr(E H E^T) with E the error of the weight and H the
second moments of its inputs, as GPTQ does (arXiv 2210.17323): channels by falling diagonal of H with the scales of all
groups fixed beforehand. Scales are searched by GPTQ's own weights, then refitted in closed form, and codes descend to
where no single one of them can do better. Tables of rows (SqueezeLLM, arXiv 2306.07629) are k-means by those weights.

Where calibration also summed up how the original model's inputs differ, the weight aims at the original's outputs
(GPTAQ, arXiv 2504.02692, and QEP, arXiv 2504.09629, in closed form, with half of the step). Where it summed up the
output gradients, the loss is tr(H_O E H E^T) (YAQA, arXiv 2505.22988): `tersor.compress.two_sided`.

Where the scheme has outliers, these are taken out first and err nowhere; errors of codes move past them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tersor.compress.grid import Grid
from tersor.compress.hessian import INPUT_DAMPING, Hessian, check_finite, exact_products
from tersor.compress.outliers import beside, part
from tersor.compress.refine import Layer
from tersor.compress.rtn import quantize_rtn
from tersor.compress.statistics import HESSIAN, OUTPUT_HESSIAN, SHIFT
from tersor.compress.sweeps import Choice
from tersor.compress.tables import places_of
from tersor.compress.two_sided import OutputHessian, refine_two_sided
from tersor.errors import InputError
from tersor.formats import SCALE_DTYPES, Encoded, Objective, Scheme, store_scales

PROPAGATION = 0.5
"""The share of the step towards the original's outputs that is taken: the whole of it fits the calibration's noise."""

_LARGEST_STEP = 0.25
"""The output energy of that step, relative to that of the row: a real one is far below, inconsistent sums far above."""


def quantize_gptq(weight: torch.Tensor, scheme: Scheme, statistics: Mapping[str, torch.Tensor]) -> Encoded:
    """Quantise a whole weight against the statistics of its layer.

    Args:
        weight: [OC, IC], float16, bfloat16 or float32, any device.
        scheme: element format and scales.
        statistics: `HESSIAN`, and what there is of `SHIFT` and `OUTPUT_HESSIAN`; moved to the weight's device.

    Returns:
        Codes and scales, and `objective`: the loss by the damped matrices of round to nearest and of these codes. The
        latter is never larger; rows that nothing improves are those of `quantize_rtn`.

    Raises:
        NonFiniteError, FormatError, ScaleError: as `quantize_rtn`.
        InputError: statistics of another shape, not finite, or not second moments; it names them.
    """
    nearest = quantize_rtn(weight, scheme.dense)
    statistics = {name: statistic.to(weight.device) for name, statistic in statistics.items()}
    check_statistics(weight, statistics)
    with exact_products(), torch.no_grad():
        hessian = Hessian.of(statistics[HESSIAN], INPUT_DAMPING, HESSIAN)
        grid = Grid.of(scheme.dense, weight.shape[1], weight.dtype, weight.device)
        rows = weight.float()
        if SHIFT in statistics:
            rows = rows + propagated(rows, statistics[SHIFT], hessian)
        if scheme.outliers is not None:
            parted = part(weight, scheme.outliers, grid, hessian.natural.diagonal())
            layer = Layer.of(grid, hessian, ~parted.kept)
            nearest = quantize_rtn(parted.rest, scheme.dense, ~parted.kept)
            rest, rows = parted.rest, rows - parted.values
        else:
            layer, rest = Layer.of(grid, hessian), weight
        target = layer.columns(rows)
        start = layer.judge(target, choice_of(nearest, layer))
        if OUTPUT_HESSIAN in statistics:
            output = OutputHessian.of(statistics[OUTPUT_HESSIAN], OUTPUT_HESSIAN)
            before, after, best = refine_two_sided(layer, output, target, start)
            unit = hessian.unit * output.unit
        else:
            judged = layer.refine(target, start)
            before, after, best = float(start.loss.sum()), float(judged.loss.sum()), judged.choice
            unit = hessian.unit
        encoded = encoded_of(rest, nearest, layer, best, Objective(before * unit, after * unit))
        return encoded if scheme.outliers is None else beside(encoded, parted, weight, scheme)


def check_statistics(weight: torch.Tensor, statistics: Mapping[str, torch.Tensor]) -> None:
    """Check that statistics have the shapes of a weight's channels.

    Raises:
        InputError: they have not.
    """
    oc, ic = weight.shape
    expected = {HESSIAN: ic, SHIFT: ic}
    for name, size in expected.items():
        if name in statistics and tuple(statistics[name].shape) != (size, size):
            shape = list(statistics[name].shape)
            raise InputError(f"statistics {name!r} have shape {shape}, and the weight needs [{size}, {size}]")
    output = statistics.get(OUTPUT_HESSIAN)
    if output is not None and (output.ndim not in (2, 3) or output.shape[:-1].numel() != oc):
        raise InputError(
            f"statistics {OUTPUT_HESSIAN!r} have shape {list(output.shape)}, and the weight has {oc} output features"
        )


def propagated(rows: torch.Tensor, shift: torch.Tensor, hessian: Hessian) -> torch.Tensor:
    """Return the step a W S H^-1 towards the original's outputs, float32 [OC, IC], shortened where it is implausible.

    With S = mean of (x' - x) x^T the weight W + W S H^-1 gives on x, by least squares, what W gives on x'.

    Raises:
        InputError: the shift is not finite.
    """
    check_finite(shift, SHIFT)
    step = PROPAGATION * hessian.solve(rows @ (shift.float() / hessian.unit))
    energy, own = (((part @ hessian.natural) * part).sum(dim=1, keepdim=True) for part in (step, rows))
    most = torch.where(energy > 0, (_LARGEST_STEP * own / energy).sqrt().clamp(max=1), 0.0)
    return torch.nan_to_num(step * most, nan=0.0, posinf=0.0, neginf=0.0)


def choice_of(encoded: Encoded, layer: Layer) -> Choice:
    """Return codes that are there already, as columns in the Hessian's order."""
    scheme, groups = encoded.scheme, layer.grid.groups
    oc, ic = encoded.codes.shape
    if scheme.has_table:
        numbers = layer.columns(encoded.dequantize())
        numbers = numbers if layer.kept is None else numbers * layer.kept
        return Choice.of_tables(numbers, encoded.scales().T.contiguous())
    values = scheme.format.decode(encoded.codes)
    zero_point = torch.zeros(oc, groups, device=values.device)
    if encoded.zero_point is not None:
        zero_point = encoded.zero_point.float()
        values = (values.view(oc, groups, -1) - zero_point.unsqueeze(2)).view(oc, ic)
    scale = encoded.scales().T.contiguous()
    return Choice(layer.columns(values), scale, zero_point.T.contiguous())


def encoded_of(weight: torch.Tensor, nearest: Encoded, layer: Layer, best: Choice, objective: Objective) -> Encoded:
    """Return the choice as codes and scales, with its squared error against the weight."""
    scheme, zero_point = nearest.scheme, best.zero_point.T.contiguous()
    scale, rows = (best.scale if best.tables is None else best.tables).T.contiguous(), layer.rows(best.values)
    codes = layer.grid.codes(rows, zero_point) if best.tables is None else places_of(rows, scale).to(torch.uint8)
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    error = (layer.rows(best.decoded(layer.groups)) - weight.float()).double()
    return Encoded(
        scheme=scheme,
        codes=codes,
        scale=scale.to(dtype) if dtype.is_floating_point else store_scales(scale, scheme),
        zero_point=zero_point.to(torch.uint8) if scheme.has_zero_point else None,
        squared_error=float(error.square_().sum()),
        squared_norm=nearest.squared_norm,
        underflowed=nearest.underflowed,
        objective=objective,
    )
