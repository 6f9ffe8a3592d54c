"""How good is it? Perplexity, divergence from a reference, and the picture of size against quality."""

from __future__ import annotations

from tersor.evaluate.load import (
    Located,
    bits_per_weight,
    choose_threads,
    load_model,
    load_tokenizer,
    locate,
    read_text,
    resolve_device,
    resolve_dtype,
)
from tersor.evaluate.quality import Quality, cut_windows, evaluate

__all__ = [
    "Located",
    "Quality",
    "bits_per_weight",
    "choose_threads",
    "cut_windows",
    "evaluate",
    "load_model",
    "load_tokenizer",
    "locate",
    "read_text",
    "resolve_device",
    "resolve_dtype",
]
