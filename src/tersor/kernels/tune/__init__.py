"""Which tile for this shape on this chip? Pure functions from a problem to a configuration."""

from tersor.kernels.tune.linear import ROWS, LinearConfig, LinearProblem, choose, n_tile

__all__ = ["ROWS", "LinearConfig", "LinearProblem", "choose", "n_tile"]
