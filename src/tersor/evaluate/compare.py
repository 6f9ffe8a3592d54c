"""Which of two models is nearer to the reference? Differences on the same windows, more certain than the two errors.

Both models read the same windows, so what makes a window hard for one makes it hard for the other, and cancels in the
difference. With d_i the difference of the two means over window i and n windows, the difference has the standard error
sd(d) / sqrt(n).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from tersor.errors import InputError
from tersor.evaluate.quality import PerWindow, Quality, mean


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Another model against a first one, on the same windows; `*_error` is a standard error, `None` for one window.

    Attributes:
        windows: how many there are.
        log_perplexity_difference: the other's mean negative log-likelihood less the first's, nats per token.
        log_perplexity_better: windows that the first predicts better.
        kl_difference: the other's KL(reference || model) less the first's, nats per token; `None` without a reference.
        kl_better: windows in which the first is nearer to the reference.
    """

    windows: int
    log_perplexity_difference: float
    log_perplexity_difference_error: float | None
    log_perplexity_better: int
    kl_difference: float | None = None
    kl_difference_error: float | None = None
    kl_better: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold; fields without a value are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def compare(first: Quality, other: Quality) -> Comparison:
    """Compare what `evaluate` measured of two models on the same windows.

    Raises:
        InputError: the windows are not as many, or not as long, or their means were not kept.
    """
    one, two = _means(first), _means(other)
    if (first.windows, first.window) != (other.windows, other.window):
        raise InputError(
            f"{first.windows} windows of {first.window} tokens and {other.windows} of {other.window} are not the same "
            "text: compare models that were measured together"
        )
    found: dict[str, Any] = {}
    for name, left, right in (("log_perplexity", one.nll, two.nll), ("kl", one.kl, two.kl)):
        if left is None or right is None:
            continue
        gaps = torch.tensor(right, dtype=torch.float64) - torch.tensor(left, dtype=torch.float64)
        found[f"{name}_difference"], found[f"{name}_difference_error"] = mean(gaps)
        found[f"{name}_better"] = int((gaps > 0).sum())
    return Comparison(windows=first.windows, **found)


def _means(quality: Quality) -> PerWindow:
    if quality.per_window is None:
        raise InputError("the means of the windows were not kept: compare what `evaluate` returned")
    return quality.per_window
