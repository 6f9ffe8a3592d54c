"""Which tile for this shape on this chip? Pure functions from a problem to a configuration, and measured choices."""

from tersor.kernels.tune.linear import LinearConfig, LinearProblem, candidates, fused, predict, seconds
from tersor.kernels.tune.table import choose

__all__ = ["LinearConfig", "LinearProblem", "candidates", "choose", "fused", "predict", "seconds"]
