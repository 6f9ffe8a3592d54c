"""Which tile for this shape on this chip? Pure functions from a problem to a configuration."""

from tersor.kernels.tune.linear import choose, fused
from tersor.kernels.tune.problem import SM80, SM90, LinearConfig, LinearProblem

__all__ = ["SM80", "SM90", "LinearConfig", "LinearProblem", "choose", "fused"]
