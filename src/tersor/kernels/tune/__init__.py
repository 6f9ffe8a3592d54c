"""Which tile for this shape on this chip? Pure functions from a problem to a configuration, and measured choices."""

from tersor.kernels.tune.beside import SCRATCH_BYTES, decodes_beside, slice_rows, splits_sums
from tersor.kernels.tune.choice import (
    MOST_NORMED,
    ROUND_ROW_BYTES,
    choices,
    choose,
    choose_beside,
    choose_normed,
    filled,
    takes_norms,
    takes_outliers,
    tile_takes_outliers,
)
from tersor.kernels.tune.problem import SM80, SM90, LinearConfig, LinearProblem
from tersor.kernels.tune.schedules import candidates, fused, launched, predict, seconds

__all__ = [
    "MOST_NORMED",
    "ROUND_ROW_BYTES",
    "SCRATCH_BYTES",
    "SM80",
    "SM90",
    "LinearConfig",
    "LinearProblem",
    "candidates",
    "choices",
    "choose",
    "choose_beside",
    "choose_normed",
    "decodes_beside",
    "filled",
    "fused",
    "launched",
    "predict",
    "seconds",
    "slice_rows",
    "splits_sums",
    "takes_norms",
    "takes_outliers",
    "tile_takes_outliers",
]
