"""Which tile for this shape on this chip? Pure functions from a problem to a configuration."""

from tersor.kernels.tune.linear import LinearConfig, LinearProblem, choose, fused

__all__ = ["LinearConfig", "LinearProblem", "choose", "fused"]
