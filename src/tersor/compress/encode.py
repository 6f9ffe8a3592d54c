"""The one entry to compression: every recipe by its name, a block of rows at a time.

A new recipe is a function in a file of its own and a line in `RECIPES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from tersor.compress.gptq import quantize_gptq
from tersor.compress.rtn import quantize_rtn
from tersor.compress.statistics import HESSIAN
from tersor.compress.workers import worker_pool
from tersor.errors import InputError, NonFiniteError, did_you_mean
from tersor.formats import SCALE_DTYPES, Encoded, Objective, ScaleError, Scheme

Statistics: TypeAlias = Mapping[str, torch.Tensor]
"""What calibration has summed up for one layer, by name, such as the Hessian [IC, IC] of its inputs."""

DEFAULT_RECIPE = "rtn"
CALIBRATED_RECIPE = "gptq"
"""The default where there is a text to calibrate on."""

BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Elements of a block, by type of device: on a CPU what the passes over a block touch stays in its cache."""

_MAX_WORKERS = 32


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to choose codes.

    Attributes:
        quantize: returns the codes for (rows of a weight [rows, IC], scheme, statistics of the layer).
        summary: what it does to weights, in the past tense: `rounded to nearest`.
        needs: names of the statistics without which it cannot work.
        all_rows: whether rows influence each other, so that it takes no less than a whole weight.
    """

    quantize: Callable[[torch.Tensor, Scheme, Statistics], Encoded]
    summary: str
    needs: tuple[str, ...] = ()
    all_rows: bool = False


RECIPES: dict[str, Recipe] = {
    DEFAULT_RECIPE: Recipe(lambda weight, scheme, _: quantize_rtn(weight, scheme), "rounded to nearest"),
    CALIBRATED_RECIPE: Recipe(quantize_gptq, "calibrated by GPTQ", (HESSIAN,), all_rows=True),
}
"""Every recipe by the name that `quantize(algorithm=...)` and `--algorithm` take."""


def get_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        InputError: there is none.
    """
    if name not in RECIPES:
        near = ": it is a transform (--transform awq)" if name == "awq" else did_you_mean(name, RECIPES)
        raise InputError(f"unknown algorithm {name!r}{near} (known: {', '.join(RECIPES)})")
    return RECIPES[name]


def encode(
    weight: torch.Tensor, scheme: Scheme, recipe: str = DEFAULT_RECIPE, statistics: Statistics | None = None
) -> Encoded:
    """Encode a whole weight.

    Args:
        weight: [OC, IC], any float dtype, any device.
        scheme: element format and scales.
        recipe: a key of `RECIPES`.
        statistics: of the layer, on the weight's device, where the recipe needs some.

    Returns:
        Codes and scales on the weight's device. `encode_blocks` needs less memory where codes are packed at once.

    Raises:
        InputError: no such recipe, or statistics that it needs are not there.
        NonFiniteError: the weight holds a NaN or an infinity, with its index.
        FormatError: the group size does not divide IC.
        ScaleError: a scale does not fit its dtype; it names the row.
    """
    oc, ic = weight.shape
    groups, device = (oc, scheme.groups(ic)), weight.device
    codes = torch.empty(oc, ic, dtype=torch.uint8, device=device)
    scale = torch.empty(groups, dtype=SCALE_DTYPES[scheme.scale_dtype], device=device)
    zero_point = torch.empty(groups, dtype=torch.uint8, device=device) if scheme.has_zero_point else None
    kept = 0 if scheme.outliers is None else scheme.outliers.per_row(ic)
    outliers = torch.empty(oc, kept, dtype=torch.int32, device=device) if kept else None

    underflowed: list[int] = []
    objectives: list[Objective] = []

    def take(start: int, block: Encoded) -> None:
        rows = slice(start, start + len(block.codes))
        objectives.extend([block.objective] if block.objective else [])
        underflowed.extend(start + row for row in block.underflowed)
        codes[rows], scale[rows] = block.codes, block.scale
        if zero_point is not None and block.zero_point is not None:
            zero_point[rows] = block.zero_point
        if outliers is not None and block.outliers is not None:
            outliers[rows] = block.outliers

    error, norm = encode_blocks(weight, scheme, take, recipe, statistics)
    objective = Objective.sum(objectives) if objectives else None
    return Encoded(scheme, codes, scale, zero_point, error, norm, tuple(sorted(underflowed)), objective, outliers)


def encode_blocks(
    weight: torch.Tensor,
    scheme: Scheme,
    take: Callable[[int, Encoded], None],
    recipe: str = DEFAULT_RECIPE,
    statistics: Statistics | None = None,
    *,
    first_row: int = 0,
    block_elements: int | None = None,
) -> tuple[float, float]:
    """Encode a weight, or some of its rows, block by block.

    On a CPU blocks are encoded side by side, each on one thread, on as many threads as torch uses in the calling one:
    faster than each block on all threads, and steady on a busy machine.

    Args:
        weight: [rows, IC], any float dtype, any device.
        scheme: element format and scales.
        take: called for each block with the number of its first row in `weight` and its codes; from any thread, in any
            order.
        recipe: a key of `RECIPES`; one that takes whole weights gets all rows in one block.
        statistics: of the layer, on the weight's device, where the recipe needs some.
        first_row: number of the first row in the whole weight, for errors.
        block_elements: elements of a block; by default those of `BLOCK_ELEMENTS`.

    Returns:
        Squared error and squared norm, each summed over all rows.

    Raises:
        InputError: no such recipe, or statistics that it needs are not there.
        NonFiniteError: a NaN or an infinity, with its index in the whole weight.
        FormatError: the group size does not divide IC.
        ScaleError: a scale does not fit its dtype; it names the row.
    """
    chosen, known = get_recipe(recipe), statistics or {}
    missing = [name for name in chosen.needs if name not in known]
    if missing:
        raise InputError(f"algorithm {recipe!r} needs statistics of the layer, and there are no {', '.join(missing)}")
    count, ic = weight.shape
    elements = block_elements or BLOCK_ELEMENTS.get(weight.device.type, BLOCK_ELEMENTS["cpu"])
    height = max(1, count if chosen.all_rows else elements // max(ic, 1))

    def encode_block(start: int) -> tuple[float, float]:
        block = weight[start : start + height].contiguous()
        try:
            narrow = _narrow(block) if block.dtype == torch.float64 else block
            encoded = chosen.quantize(narrow, scheme, known)
        except NonFiniteError as error:
            row, column = error.index
            raise NonFiniteError((row + start + first_row, column), error.value) from None
        except ScaleError as error:
            raise ScaleError(error.row + start + first_row, error.reason) from None
        if narrow is not block:
            lost = ((block != 0).any(dim=1) & ~(narrow != 0).any(dim=1)).nonzero().flatten().tolist()
            encoded = replace(encoded, underflowed=tuple(sorted({*encoded.underflowed, *lost})))
        take(start, encoded)
        return encoded.squared_error, encoded.squared_norm

    starts = range(0, count, height)
    workers = min(torch.get_num_threads(), _MAX_WORKERS, len(starts)) if weight.device.type == "cpu" else 1
    if workers > 1:
        with worker_pool(workers, "tersor-encode") as pool:
            sums = list(pool.map(encode_block, starts))
    else:
        sums = [encode_block(start) for start in starts]
    return math.fsum(error for error, _ in sums), math.fsum(norm for _, norm in sums)


def _narrow(block: torch.Tensor) -> torch.Tensor:
    """Return float64 rows as float32, in which codes and scales are chosen.

    Raises:
        NonFiniteError: a weight is beyond float32's largest number, with its index and value.
    """
    narrow = block.float()
    beyond = torch.isinf(narrow) & torch.isfinite(block)
    if bool(beyond.any()):
        row, column = (int(axis) for axis in beyond.nonzero()[0])
        raise NonFiniteError((row, column), float(block[row, column]))
    return narrow
