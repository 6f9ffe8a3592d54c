"""Results of `tersor eval` and `tersor bench` as files, with numbers made up here."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {"commit": "abc1234", "tersor": "0.1.0", "torch": "2.11.0", "cuda": None, "date": "2026-11-30"}
REFERENCE = (3.0, 3.5, 2.5, 3.25)
"""Negative log-likelihoods of the reference, of four windows of 64 tokens."""

COMPARED = ("kl", "flips", "reference", "perplexity_ratio")
"""How names of what a model has only beside a reference begin."""


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Return a mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def model(label: str, kl: Sequence[float], *, size: int = 5_600_000, bits: float = 4.25, **more: Any) -> dict[str, Any]:
    """Return a model whose losses are the reference's, and KL above them."""
    losses = [one + other for one, other in zip(REFERENCE, kl, strict=True)]
    (loss, loss_error), (base, _), (gap, gap_error) = mean(losses), mean(REFERENCE), mean(kl)
    ratio = math.exp(gap)
    return {
        "model": label,
        "label": label,
        "activations": "16bit",
        "kv_dtype": None,
        "weight_bytes": size,
        "bits_per_weight": bits,
        "windows_sha256": "00ff",
        "windows": 4,
        "window": 64,
        "tokens": 252,
        "perplexity": math.exp(loss),
        "perplexity_error": math.exp(loss) * loss_error,
        "reference_perplexity": math.exp(base),
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": ratio * gap_error,
        "kl": gap,
        "kl_error": gap_error,
        "kl_median": statistics.median(kl),
        "kl_p99": 10 * gap,
        "flips": 0.125,
        "flips_error": 0.02,
        "per_window": {"nll": losses, "reference_nll": list(REFERENCE), "kl": list(kl)},
        **more,
    }


def evaluation(*models: dict[str, Any], floor: float | None = 0.002, **more: Any) -> dict[str, Any]:
    """Return a result of `tersor eval` against a reference called `base`."""
    base, error = mean(REFERENCE)
    alone = model("base", [0.0] * 4, bits=16)
    origin = {key: value for key, value in alone.items() if not key.startswith(COMPARED)}
    rounded = {"rounding": "inputs of products in bfloat16", "kl": floor, "kl_error": 0.0001, "per_window": {}}
    return {
        "kind": "tersor eval",
        "version": 1,
        "environment": ENVIRONMENT,
        "text": "text.txt",
        "device": "cpu",
        "dtype": "auto",
        "models": list(models),
        "reference_model": {**origin, "perplexity": math.exp(base), "perplexity_error": math.exp(base) * error},
        **({} if floor is None else {"noise_floor": rounded}),
        **more,
    }


def latency() -> dict[str, Any]:
    """Return a result of `tersor bench latency`."""
    row = {"name": "llama-3-8b", "format": "fp6_e3m2", "batch": 8, "context": 512, "milliseconds": 2.5}
    return {
        "kind": "tersor bench latency",
        "version": 1,
        "environment": {**ENVIRONMENT, "gpu": "NVIDIA H200"},
        "method": "milliseconds a decode step",
        "dtype": "float16",
        "read_bandwidth": 4e12,
        "rows": [{**row, "weight_bytes": 5_000_000_000, "kv_bytes": 1_000_000_000, "cuda_graph": True}],
        "skipped": [{"name": "opt-30b", "format": "int4", "what": "", "why": "it does not fit"}],
    }


def write(path: Path, result: Any) -> str:
    """Write a result; return its path as text."""
    path.write_text(json.dumps(result), encoding="utf-8")
    return str(path)
