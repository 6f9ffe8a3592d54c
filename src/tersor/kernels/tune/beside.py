"""Outliers of many tokens: are they gathered beside products, or is the weight decoded, with them, for cuBLAS?

Gathering takes clocks of shared memory for every round and token; decoding takes bytes, whatever the number of tokens.
Both times are predicted, and the weight is decoded where that is less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tersor.hardware import Chip
from tersor.kernels.tune import schedules, sm90
from tersor.kernels.tune.choice import ROUND_ROW_BYTES, choose_beside, filled
from tersor.kernels.tune.problem import LinearProblem
from tersor.layouts.blocks import BLOCK_OC, UNIT_OC, ic_blocks, oc_blocks

SCRATCH_BYTES = 256 << 20
"""Decoded weights held at a time: of a larger weight slices of rows that are about even."""
_GATHERED_TOKENS = 64
"""Up to so many tokens outliers are gathered: the bytes of a decoded weight alone take longer."""
_TILE = 128
"""Rows and tokens of a tile of cuBLAS: where as many as there are multiprocessors fit, it splits no sums."""
_ALIGNED = 8
"""Channels of 16 bytes: of rows that do not begin with them cuBLAS takes other, slower kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideCosts:
    """What times are predicted from.

    Attributes:
        gather: clocks of a multiprocessor that a round of outliers takes with eight tokens.
        start: seconds of a launch before and behind its loads.
        cublas: part of the tensor cores' peak that cuBLAS reaches for long.
        memory: part of the datasheet's bandwidth that decoding and cuBLAS reach.
    """

    gather: float = 7.0
    start: float = 4.0e-6
    cublas: float = 0.68
    memory: float = 0.88


COSTS = BesideCosts()
"""Of an H200, fitted to times of 128 to 2,048 tokens in bench/results/outliers_h200.json, of which they choose the
shorter one in all 20 cases. `cublas` fits 1,597 times of 128 to 4,096 tokens in token_counts_h200.csv: it is 0.5 % too
fast on average, and off by 7 %."""


def decodes_beside(problem: LinearProblem, rounds: int, chip: Chip) -> bool:
    """Tell whether a product is predicted to take less where the weight is decoded, with its outliers, for cuBLAS.

    Args:
        problem: of the dense part, native and not batch-invariant.
        rounds: of outliers that a block has a place for (`layouts.outliers`).
        chip: of compute capability 9.0.
    """
    if problem.n <= _GATHERED_TOKENS or problem.oc % _ALIGNED or problem.ic % _ALIGNED:
        return False
    wide = replace(problem, n=filled(problem.n))
    gathered = gathered_seconds(wide, rounds, chip)
    return gathered is None or decoded_seconds(wide, rounds, chip) < gathered


def gathered_seconds(problem: LinearProblem, rounds: int, chip: Chip, costs: BesideCosts = COSTS) -> float | None:
    """Return the predicted time of the fused kernel that gathers; `None` where there is none."""
    config = choose_beside(problem, rounds, chip)
    if config is None:
        return None
    beside = replace(problem, scale_bytes=problem.scale_bytes + ROUND_ROW_BYTES * rounds)
    walked = _filled_rounds(rounds) * oc_blocks(problem.oc) * ic_blocks(problem.ic)
    clocks = costs.gather / 8 * problem.n * walked / chip.sms
    return schedules.seconds(beside, config, chip) + clocks / sm90.clock(chip)


def decoded_seconds(problem: LinearProblem, rounds: int, chip: Chip, costs: BesideCosts = COSTS) -> float:
    """Return the predicted time of a product by cuBLAS with a weight whose slices are decoded ahead of it."""
    oc, ic, n, bandwidth = problem.oc, problem.ic, problem.n, chip.bandwidth * costs.memory
    rows = slice_rows(oc, ic)
    slices, weights = -(-oc // rows), oc * ic
    row_bytes = BLOCK_OC * problem.bits + problem.scale_bytes + ROUND_ROW_BYTES * rounds
    decoding = (oc * ic_blocks(ic) * row_bytes + 2 * weights) / bandwidth
    product = max(2 * weights / bandwidth, 2 * weights * n / (chip.fp16_ops * costs.cublas))
    rounding = costs.start + 10 * n * oc / bandwidth if splits_sums(rows, n, chip) else 0.0
    return slices * 2 * costs.start + decoding + product + rounding


def slice_rows(oc: int, ic: int) -> int:
    """Return the rows of a weight that are decoded at a time: whole units, or all."""
    slices = -(-2 * oc * ic // SCRATCH_BYTES)
    return min(oc, -(-oc // slices // UNIT_OC) * UNIT_OC) if slices > 1 else oc


def splits_sums(rows: int, n: int, chip: Chip) -> bool:
    """Tell whether cuBLAS may split sums, and round the parts: it has fewer tiles than there are multiprocessors."""
    return -(-n // _TILE) * -(-rows // _TILE) < chip.sms


def _filled_rounds(rounds: int) -> float:
    """Return about how many rounds a block fills where so many have a place."""
    return 1.14 if rounds == 1 else 0.75 * rounds + 0.25
