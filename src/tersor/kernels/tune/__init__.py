"""Which tile for this shape on this chip? Pure functions from a problem to a configuration, and measured choices."""

from tersor.kernels.tune.choice import choices, choose
from tersor.kernels.tune.problem import SM80, SM90, LinearConfig, LinearProblem
from tersor.kernels.tune.schedules import candidates, fused, launched, predict, seconds

__all__ = [
    "SM80",
    "SM90",
    "LinearConfig",
    "LinearProblem",
    "candidates",
    "choices",
    "choose",
    "fused",
    "launched",
    "predict",
    "seconds",
]
