"""The choice for one linear: which schedule, and how it runs."""

from __future__ import annotations

import functools

from tersor.hardware import Chip
from tersor.kernels.tune import sm80, sm90
from tersor.kernels.tune.problem import LinearConfig, LinearProblem


def fused(problem: LinearProblem, chip: Chip) -> bool:
    """Tell whether a fused kernel takes the problem; otherwise weights are decoded for cuBLAS."""
    return problem.n <= sm80.TOKENS or (chip.capability == (9, 0) and problem.aligned)


@functools.lru_cache(maxsize=4096)
def choose(problem: LinearProblem, chip: Chip) -> LinearConfig:
    """Choose the fused kernel's configuration by predicted time; `fused` must say yes."""
    if chip.capability == (9, 0) and problem.aligned:
        return sm90.choose(problem, chip)
    return sm80.choose(problem, chip)
