"""How long do products take that nobody has timed? Of whatever row sets a weight has, by what tiles cost on a chip.

Who chooses levels of a mix by time (`convert.latency`) and who plans over several GPUs (`planner.cost`) ask here.
"""

from __future__ import annotations

from collections.abc import Sequence

from tersor.hardware import Chip
from tersor.kernels.tune import experts as tune_experts
from tersor.kernels.tune import mixed as tune_mixed
from tersor.kernels.tune.problem import LinearProblem
from tersor.kernels.tune.schedules import predict, seconds

GATHERED = 3e-6
"""Seconds of the two launches that put in order what the row sets of a mix give where no kernel takes them all
(`ops.grouped`, `ops.mixed`): what two launches of little work take one behind the other."""


def linear_seconds(problems: Sequence[LinearProblem], chip: Chip) -> float:
    """Predict the time of a product whose weight has these row sets, in seconds; `schedules.fused` says yes to all.

    Args:
        problems: one, or one for each level of a mix; those without rows do not count.
        chip: where it runs.
    """
    some = tuple(problem for problem in problems if problem.oc)
    if chip.capability == (9, 0) and len(some) > 1:
        mixed = tune_mixed.MixedProblem(levels=tuple(problems))
        return tune_mixed.seconds(mixed, tune_mixed.choose(mixed, chip), chip)
    return sum(seconds(problem, predict(problem, chip), chip) for problem in some) + ordering_seconds(some)


def experts_seconds(ups: tune_experts.Problems, downs: tune_experts.Problems, chip: Chip) -> float:
    """Predict the time of both products of the experts of a layer, of either alone where the other has no row sets."""
    apart = [sets for sets in (ups, downs) if not tune_experts.together(sets, chip)]
    return tune_experts.predicted_seconds(ups, downs, chip) + sum(map(ordering_seconds, apart))


def ordering_seconds(sets: Sequence[object]) -> float:
    """Return the seconds that several row sets take beside their launches."""
    return GATHERED if len(sets) > 1 else 0.0
