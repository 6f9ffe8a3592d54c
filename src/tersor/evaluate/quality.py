"""Perplexity of a model on a text and, against a reference model, KL divergence and flips.

Convention. The text is tokenised once, without special tokens, and cut into consecutive windows of `window`
tokens that do not overlap; the last, partial window is dropped. A window is fed on its own and predicts its
tokens 2..window, so every window counts `window - 1` predictions and none sees another window's text.

Standard errors treat the windows as independent samples: with m_i the mean of a quantity over window i and n
windows, the mean has the standard error sd(m) / sqrt(n), sd with n - 1. Perplexity is exp(mean), so by the
delta method its standard error is perplexity * se(mean). One window gives no standard error (None).

Logits are compared as the models give them, in the dtype that is served: each is taken to float64 as it is, and all of
log-softmax, divergence and sums is float64. No logits are kept, so none is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tersor.errors import InputError, TersorError
from tersor.evaluate.predictors import Predictor, TransformersModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LARGEST_LOSS = 500.0
"""Nats a token; exp of it, times any error, is still far from the largest float."""

CHUNK = 1 << 20
"""Logits that are float64 log-probabilities at a time: 8 MB a model, whatever the vocabulary."""

PERCENTILE = 99.0
"""Of the KL divergences of tokens, `Quality.kl_p99`."""


@dataclass(frozen=True, kw_only=True)
class PerWindow:
    """Means over each window, in the order of the windows; without a reference all but `nll` are `None`.

    Attributes:
        nll: negative log-likelihood, nats per token.
        reference_nll: that of the reference.
        kl: KL(reference || model), nats per token.
        kl_reverse: KL(model || reference), nats per token.
        flips: fraction of predictions whose most probable token is not the reference's.
    """

    nll: tuple[float, ...]
    reference_nll: tuple[float, ...] | None = None
    kl: tuple[float, ...] | None = None
    kl_reverse: tuple[float, ...] | None = None
    flips: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, list[float]]:
        """Return the fields as lists; those without values are left out."""
        return {name: list(value) for name, value in asdict(self).items() if value is not None}


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
        kl_median: the median over windows of a window's mean, which one window in ten with a heavy tail does not move.
        kl_p99: the 99th percentile over tokens.
        kl_reverse: mean KL(model || reference) in nats per token.
        flips: fraction of predictions whose most probable token is not the reference's; of equally probable tokens
            the first one counts.
        per_window: what means and errors are made of, not part of `to_dict`; `None` where it was not kept.
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
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_reverse: float | None = None
    kl_reverse_error: float | None = None
    flips: float | None = None
    flips_error: float | None = None
    per_window: PerWindow | None = None

    @property
    def top1_agreement(self) -> float | None:
        """Fraction of predictions whose most probable token is the reference's: 1 - flips."""
        return None if self.flips is None else 1.0 - self.flips

    @property
    def top1_agreement_error(self) -> float | None:
        """Standard error of `top1_agreement`: that of flips."""
        return self.flips_error

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, `top1_agreement` too, as JSON can hold them; those without a value are left out."""
        names = [field.name for field in fields(self) if field.name != "per_window"]
        found = {name: getattr(self, name) for name in (*names, "top1_agreement", "top1_agreement_error")}
        return {name: value for name, value in found.items() if value is not None}


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel | Predictor,
    windows: torch.Tensor,
    *,
    reference: PreTrainedModel | Predictor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Measure `model` on `windows`, against `reference` when there is one.

    Holds the logits of one window a model, and of every token its divergence, whatever the length of the text.

    Args:
        model: a causal language model of transformers, or another `Predictor` such as the engine's (`engine_model`).
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
    means: list[list[float]] = []
    divergences: list[torch.Tensor] = []
    count, window = windows.shape
    for index, tokens in enumerate(windows):
        try:
            of_window, of_tokens = _measure(one, other, tokens, index)
        except torch.OutOfMemoryError:
            raise TersorError(f"GPU memory ran out in a window of {window} tokens: use a smaller one") from None
        means.append(of_window)
        divergences.append(of_tokens)
        if progress is not None:
            progress(index + 1, count)
    return _summary(torch.tensor(means, dtype=torch.float64), torch.cat(divergences), window)


def _predictor(model: PreTrainedModel | Predictor) -> Predictor:
    return model if isinstance(model, Predictor) else TransformersModel(model)


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


def _measure(
    model: Predictor, reference: Predictor | None, tokens: torch.Tensor, index: int
) -> tuple[list[float], torch.Tensor]:
    """Return what `_compared` does of the window `tokens`, whose logits live no longer than this call."""
    logits = model.logits(tokens)[:-1]  # the last row predicts nothing
    other = None if reference is None else logits if reference is model else reference.logits(tokens)[:-1]
    means, divergences = _compared(logits, other, tokens[1:])
    if not all(math.isfinite(mean) for mean in means):
        if math.isfinite(means[0]) and reference is not None and other is not None:
            raise _failure(reference, "reference ", other, tokens, index, means[1])
        raise _failure(model, "", logits, tokens, index, means[0])
    return means, divergences


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


def _compared(
    logits: torch.Tensor, reference: torch.Tensor | None, targets: torch.Tensor
) -> tuple[list[float], torch.Tensor]:
    """Compare what two models say of a window, as many rows at a time as `CHUNK` holds.

    Args:
        logits, reference: [T, V] of any float dtype, on any two devices.
        targets: int64 [T], the tokens that are predicted.

    Returns:
        Means over the window: [nll] or [nll, reference nll, kl, reverse kl, flips]; and KL(reference || model) of each
        token, float64 [T] on the CPU, or [0] without a reference.
    """
    sums = torch.zeros(1 if reference is None else 5, dtype=torch.float64, device=logits.device)
    targets = targets.to(logits.device).unsqueeze(1)
    divergences = []
    count, vocabulary = logits.shape
    step = max(1, CHUNK // vocabulary)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        log_p = logits[rows].double().log_softmax(dim=-1)
        sums[0] -= log_p.gather(1, targets[rows]).sum()
        if reference is not None:
            log_q = reference[rows].to(logits.device).double().log_softmax(dim=-1)
            sums[1] -= log_q.gather(1, targets[rows]).sum()
            gap = log_q - log_p
            # Tokens that a model excludes (minus infinity) make 0 * infinity, which counts 0; NaN shows in the sums
            # above.
            divergences.append((log_q.exp() * gap).nansum(dim=-1).clamp_(min=0))
            sums[2] += divergences[-1].sum()
            sums[3] -= (log_p.exp() * gap).nansum()
            sums[4] += (log_p.argmax(dim=-1) != log_q.argmax(dim=-1)).sum()
    means: list[float] = (sums / count).tolist()
    return means, torch.cat(divergences).cpu() if divergences else torch.zeros(0, dtype=torch.float64)


def _summary(means: torch.Tensor, divergences: torch.Tensor, window: int) -> Quality:
    """Turn the means of the windows, float64 [windows, 1 or 5], and the divergences of tokens into a `Quality`."""
    count = len(means)
    nll, nll_error = mean(means[:, 0])
    found: dict[str, Any] = {"perplexity": _exp(nll, "loss")}
    found["perplexity_error"] = _times(nll_error, found["perplexity"])
    columns = dict(zip(("nll", "reference_nll", "kl", "kl_reverse", "flips"), means.T, strict=False))
    if len(columns) > 1:
        other, other_error = mean(columns["reference_nll"])
        gap, gap_error = mean(columns["nll"] - columns["reference_nll"])
        found["reference_perplexity"] = _exp(other, "reference's loss")
        found["reference_perplexity_error"] = _times(other_error, found["reference_perplexity"])
        found["perplexity_ratio"] = _exp(gap, "loss beyond the reference's")
        found["perplexity_ratio_error"] = _times(gap_error, found["perplexity_ratio"])
        for name in ("kl", "kl_reverse", "flips"):
            found[name], found[f"{name}_error"] = mean(columns[name])
        found["kl_median"] = float(np.median(columns["kl"].numpy()))
        found["kl_p99"] = float(np.percentile(divergences.numpy(), PERCENTILE))
    kept = PerWindow(**{name: tuple(column.tolist()) for name, column in columns.items()})
    return Quality(windows=count, window=window, tokens=count * (window - 1), per_window=kept, **found)


def _exp(loss: float, what: str) -> float:
    """Return exp of a loss.

    Raises:
        TersorError: it is so large that it, or its error, is beyond a float.
    """
    if loss > _LARGEST_LOSS:
        raise TersorError(f"the {what} is {loss:.4g} nats a token, too large for a perplexity: the model is broken")
    return math.exp(loss)


def mean(values: torch.Tensor) -> tuple[float, float | None]:
    """Return the mean of float64 [windows] and its standard error, `None` of one window."""
    error = None if len(values) == 1 else float(values.std(correction=1)) / math.sqrt(len(values))
    return float(values.mean()), error


def _times(error: float | None, factor: float) -> float | None:
    return None if error is None else error * factor
