"""Which tile for this shape on this chip? Pure functions from a problem to a configuration, and measured choices."""

from tersor.kernels.tune.linear import candidates, fused, launched, predict, seconds
from tersor.kernels.tune.problem import SM80, SM90, LinearConfig, LinearProblem
from tersor.kernels.tune.table import choose

__all__ = [
    "SM80",
    "SM90",
    "LinearConfig",
    "LinearProblem",
    "candidates",
    "choose",
    "fused",
    "launched",
    "predict",
    "seconds",
]
