"""Which tile for this shape on this chip? Pure functions from a problem to a configuration, and measured choices."""

from tersor.kernels.tune.choice import MOST_NORMED, choices, choose, choose_normed, takes_norms
from tersor.kernels.tune.problem import SM80, SM90, LinearConfig, LinearProblem
from tersor.kernels.tune.schedules import candidates, fused, launched, predict, seconds

__all__ = [
    "MOST_NORMED",
    "SM80",
    "SM90",
    "LinearConfig",
    "LinearProblem",
    "candidates",
    "choices",
    "choose",
    "choose_normed",
    "fused",
    "launched",
    "predict",
    "seconds",
    "takes_norms",
]
