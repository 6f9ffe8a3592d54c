"""Perplexity of a model on a text and, against a reference model, KL divergence and top-1 agreement.

Convention. The text is tokenised once, without special tokens, and cut into consecutive windows of `window`
tokens that do not overlap; the last, partial window is dropped. A window is fed on its own and predicts its
tokens 2..window, so every window counts `window - 1` predictions and none sees another window's text.

Standard errors treat the windows as independent samples: with m_i the mean of a quantity over window i and n
windows, the mean has the standard error sd(m) / sqrt(n), sd with n - 1. Perplexity is exp(mean), so by the
delta method its standard error is perplexity * se(mean). One window gives no standard error (None).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from tersor.errors import InputError, TersorError
from tersor.evaluate.predictors import EngineModel, Predictor, TransformersModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LARGEST_LOSS = 500.0
"""Nats a token; exp of it, times any error, is still far from the largest float."""

ROWS = 128
"""Rows of logits that are turned into float32 log-probabilities at a time."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a model predicts a text; `*_error` is a standard error over windows, None for one window.

    Attributes:
        windows: number of windows.
        window: tokens in a window.
        tokens: predictions counted, windows * (window - 1).
        perplexity: exp of the mean negative log-likelihood in nats.
        reference_perplexity: the reference's perplexity on the same windows.
        perplexity_ratio: perplexity / reference_perplexity; its error is paired (the same windows in both).
        kl: mean KL(reference || model) in nats per token.
        kl_reverse: mean KL(model || reference) in nats per token.
        top1_agreement: fraction of predictions whose most probable token is the reference's.
    """

    windows: int
    window: int
    tokens: int
    perplexity: float
    perplexity_error: float | None
    reference_perplexity: float | None = None
    reference_perplexity_error: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_error: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    kl_reverse: float | None = None
    kl_reverse_error: float | None = None
    top1_agreement: float | None = None
    top1_agreement_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold; fields without a value are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel | EngineModel,
    windows: torch.Tensor,
    *,
    reference: PreTrainedModel | EngineModel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Measure `model` on `windows`, against `reference` when there is one.

    Holds the logits of one window a model, whatever the length of the text.

    Args:
        model: a causal language model of transformers, or the engine's (`engine_model`).
        windows: int64 [windows, window], from `windows.cut_windows`.
        reference: the model to compare with; same vocabulary, any device.
        progress: called with (windows done, windows in all) after every window.

    Raises:
        InputError: a token that a model has no row for, a window longer than a model's positions, or a
            reference with another vocabulary.
        TersorError: logits that are not finite, a perplexity or divergence that is infinite, or too little GPU memory
            for a window.
    """
    one = _predictor(model)
    _check(one, windows, "model")
    other = None
    if reference is not None:
        other = one if reference is model else _predictor(reference)
        _check(other, windows, "reference")
        if one.vocabulary != other.vocabulary:
            raise InputError(
                f"the model has a vocabulary of {one.vocabulary} tokens and the reference one of "
                f"{other.vocabulary}: compare models of one family"
            )
    means = []
    count, window = windows.shape
    for index, tokens in enumerate(windows):
        try:
            means.append(_measure(one, other, tokens, index))
        except torch.OutOfMemoryError:
            raise TersorError(f"GPU memory ran out in a window of {window} tokens: use a smaller one") from None
        if progress is not None:
            progress(index + 1, count)
    return _summary(torch.tensor(means, dtype=torch.float64), window)


def _predictor(model: PreTrainedModel | EngineModel) -> Predictor:
    return model if isinstance(model, EngineModel) else TransformersModel(model)


def _check(model: Predictor, windows: torch.Tensor, role: str) -> None:
    limit = model.positions
    if limit is not None and windows.shape[1] > limit:
        raise InputError(f"a window of {windows.shape[1]} tokens exceeds the {role}'s {limit} positions")
    largest = int(windows.max())
    if largest >= model.vocabulary:
        raise InputError(
            f"the text holds token {largest} but the {role} has a vocabulary of {model.vocabulary}: "
            "the tokenizer belongs to another model"
        )


def _measure(model: Predictor, reference: Predictor | None, tokens: torch.Tensor, index: int) -> list[float]:
    """Means over the window `tokens`; its logits, of which the last predict nothing, live no longer than this call."""
    logits = model.logits(tokens)[:-1]
    other = None if reference is None else logits if reference is model else reference.logits(tokens)[:-1]
    means = _window_means(logits, other, tokens[1:])
    if not all(math.isfinite(mean) for mean in means):
        if math.isfinite(means[0]) and reference is not None and other is not None:
            raise _failure(reference, "reference ", other, tokens, index, means[1])
        raise _failure(model, "", logits, tokens, index, means[0])
    return means


def _failure(
    model: Predictor, role: str, logits: torch.Tensor, tokens: torch.Tensor, index: int, nll: float
) -> TersorError:
    """Say where a window went wrong: at which token, and in which layer first."""
    finite = logits.amax(dim=-1).isfinite()
    if not bool(finite.all()):
        token = int((~finite).nonzero()[0]) + 1
        where = model.not_finite(tokens)
        return TersorError(
            f"{role}window {index} gives logits that are not finite, from token {token} on{where}: try bfloat16 or "
            "float32"
        )
    if math.isfinite(nll):
        return TersorError(
            f"window {index}: the KL divergence is infinite, since one model excludes tokens that the other does not"
        )
    return TersorError(f"{role}window {index} holds a token of probability zero, so the perplexity is infinite")


def _window_means(logits: torch.Tensor, reference: torch.Tensor | None, targets: torch.Tensor) -> list[float]:
    """Means over one window: [nll] or [nll, reference nll, kl, reverse kl, agreement]."""
    sums = torch.zeros(1 if reference is None else 5, dtype=torch.float64, device=logits.device)
    targets = targets.to(logits.device).unsqueeze(1)
    for start in range(0, len(logits), ROWS):
        rows = slice(start, start + ROWS)
        log_p = logits[rows].float().log_softmax(dim=-1)
        sums[0] -= log_p.gather(1, targets[rows]).sum()
        if reference is not None:
            log_q = reference[rows].to(logits.device).float().log_softmax(dim=-1)
            sums[1] -= log_q.gather(1, targets[rows]).sum()
            gap = log_q - log_p
            # Tokens that a model excludes (minus infinity) make 0 * infinity, which counts 0; NaN shows in the sums
            # above.
            sums[2] += (log_q.exp() * gap).nansum()
            sums[3] -= (log_p.exp() * gap).nansum()
            sums[4] += (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum()
    means: list[float] = (sums / len(logits)).tolist()
    return means


def _summary(means: torch.Tensor, window: int) -> Quality:
    """Turn the means of the windows, float64 [windows, 1 or 5], into a `Quality`."""
    count = len(means)
    nll, nll_error = _mean(means[:, 0])
    fields: dict[str, Any] = {"perplexity": _exp(nll, "loss")}
    fields["perplexity_error"] = _times(nll_error, fields["perplexity"])
    if means.shape[1] > 1:
        other, other_error = _mean(means[:, 1])
        gap, gap_error = _mean(means[:, 0] - means[:, 1])
        fields["reference_perplexity"] = _exp(other, "reference's loss")
        fields["reference_perplexity_error"] = _times(other_error, fields["reference_perplexity"])
        fields["perplexity_ratio"] = _exp(gap, "loss beyond the reference's")
        fields["perplexity_ratio_error"] = _times(gap_error, fields["perplexity_ratio"])
        for column, name in enumerate(("kl", "kl_reverse", "top1_agreement"), start=2):
            fields[name], fields[f"{name}_error"] = _mean(means[:, column])
    return Quality(windows=count, window=window, tokens=count * (window - 1), **fields)


def _exp(loss: float, what: str) -> float:
    """Return exp of a loss.

    Raises:
        TersorError: it is so large that it, or its error, is beyond a float.
    """
    if loss > _LARGEST_LOSS:
        raise TersorError(f"the {what} is {loss:.4g} nats a token, too large for a perplexity: the model is broken")
    return math.exp(loss)


def _mean(values: torch.Tensor) -> tuple[float, float | None]:
    """Mean and standard error of the mean."""
    error = None if len(values) == 1 else float(values.std(correction=1)) / math.sqrt(len(values))
    return float(values.mean()), error


def _times(error: float | None, factor: float) -> float | None:
    return None if error is None else error * factor
