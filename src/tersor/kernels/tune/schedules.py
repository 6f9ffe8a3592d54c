"""The model's choice for one linear: of all configurations that can run it, the one of the least predicted time."""

from __future__ import annotations

from dataclasses import replace

from tersor.hardware import Chip
from tersor.kernels.tune import sm80, sm90
from tersor.kernels.tune.problem import SM90, LinearConfig, LinearProblem

_INVARIANT_SUMS = 1 << 24
"""Split sums that a batch-invariant launch may leave in memory, in float32 elements; more tokens take more launches."""
_WIDEST = 256


def fused(problem: LinearProblem, chip: Chip) -> bool:
    """Tell whether a fused kernel takes the problem; otherwise weights are decoded for cuBLAS."""
    return problem.n <= sm80.TOKENS or (chip.capability == (9, 0) and problem.aligned)


def launched(problem: LinearProblem, chip: Chip) -> LinearProblem:
    """Return what one launch takes of a problem: all of it, or of a batch-invariant one as many tokens as it can.

    A batch-invariant problem counts as aligned: rows that are not have to be copied, since another schedule would sum
    in another order.
    """
    if not problem.batch_invariant:
        return problem
    most = problem.n
    if chip.capability != (9, 0):
        most = sm80.TOKENS
    else:
        splits = sm90.invariant_splits(problem, chip)
        if splits > 1:
            rows = problem.oc + _WIDEST  # at the most, by whatever tiles; and tokens fill one tile more, at the most
            most = max(1, _INVARIANT_SUMS // (splits * rows * _WIDEST) - 1) * _WIDEST
    return replace(problem, n=min(problem.n, most), aligned=True)


def predict(problem: LinearProblem, chip: Chip) -> LinearConfig:
    """Return the fused kernel's configuration of the least predicted time; `fused` must say yes.

    Chips that have the sm90 schedule take it wherever it can run.
    """
    found = sm90.predict(problem, chip)
    if found is not None:
        return found
    return min(sm80.candidates(problem, chip), key=lambda config: sm80.seconds(problem, config, chip))


def candidates(problem: LinearProblem, chip: Chip) -> tuple[LinearConfig, ...]:
    """Return every configuration that a fused kernel could run the problem with; none where `fused` says no."""
    return (*sm80.candidates(problem, chip), *sm90.candidates(problem, chip))


def seconds(problem: LinearProblem, config: LinearConfig, chip: Chip) -> float:
    """Return the predicted time of a problem with one of its `candidates`, in seconds."""
    predicted = sm90.seconds if config.schedule == SM90 else sm80.seconds
    return predicted(problem, config, chip)
