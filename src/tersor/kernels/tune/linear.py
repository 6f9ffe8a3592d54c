"""The model's choice for one linear: of all configurations that can run it, the one of the least predicted time."""

from __future__ import annotations

from tersor.hardware import Chip
from tersor.kernels.tune import sm80, sm90
from tersor.kernels.tune.problem import SM90, LinearConfig, LinearProblem


def fused(problem: LinearProblem, chip: Chip) -> bool:
    """Tell whether a fused kernel takes the problem; otherwise weights are decoded for cuBLAS."""
    return problem.n <= sm80.TOKENS or (chip.capability == (9, 0) and problem.aligned)


def predict(problem: LinearProblem, chip: Chip) -> LinearConfig:
    """Return the fused kernel's configuration of the least predicted time; `fused` must say yes.

    Chips that have the sm90 schedule take it wherever it can run.
    """
    options = tuple(sm90.candidates(problem, chip)) or tuple(sm80.candidates(problem, chip))
    return min(options, key=lambda config: seconds(problem, config, chip))


def candidates(problem: LinearProblem, chip: Chip) -> tuple[LinearConfig, ...]:
    """Return every configuration that a fused kernel could run the problem with; none where `fused` says no."""
    return (*sm80.candidates(problem, chip), *sm90.candidates(problem, chip))


def seconds(problem: LinearProblem, config: LinearConfig, chip: Chip) -> float:
    """Return the predicted time of a problem with one of its `candidates`, in seconds."""
    predicted = sm90.seconds if config.schedule == SM90 else sm80.seconds
    return predicted(problem, config, chip)
