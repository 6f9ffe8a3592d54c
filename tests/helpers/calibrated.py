"""Small checkpoints with a tokenizer of numbers, and texts for them: what calibration needs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import checkpoints
from tersor.compress import Recipe, Statistics, quantize_rtn
from tersor.formats import Encoded, Scheme

VOCABULARY = 96
OPTIONS: dict[str, Any] = {
    "format": "int4",
    "group_size": 16,
    "algorithm": "gptq",
    "calibration_tokens": 96,
    "calibration_window": 32,
}
"""Three windows of 32 tokens."""


def quick(real: Recipe) -> Recipe:
    """Return a recipe that takes no time, and whose codes depend on all statistics of a layer."""

    def quantize(weight: torch.Tensor, scheme: Scheme, statistics: Statistics) -> Encoded:
        moved = weight.float()
        for name, factor in (("hessian", 0.3), ("shift", 0.3)):
            diagonal = statistics[name].diagonal() if name in statistics else torch.zeros(weight.shape[1])
            moved = moved * (1 + factor * diagonal / diagonal.abs().max().clamp_min(1e-9))
        if "output_hessian" in statistics:
            diagonal = statistics["output_hessian"].diagonal()
            moved = moved * (1 + 0.3 * diagonal / diagonal.max())[:, None]
        return quantize_rtn(moved, scheme)

    return replace(real, quantize=quantize)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer to which the word `t7` is token 7, and the end of a text token 1."""
    known = {"</s>" if number == 1 else f"t{number}": number for number in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(known, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    if template is not None:
        made.chat_template = template
    return made


def model(name: str, directory: Path, **changes: Any) -> Path:
    """Write a random model of `helpers.checkpoints` in float32 with such a tokenizer; return its directory."""
    checkpoints.save(name, directory, torch.float32, vocab_size=VOCABULARY, **changes)
    tokenizer().save_pretrained(directory)
    return directory


def words(*numbers: int) -> str:
    """Return the text of these tokens."""
    return " ".join(f"t{number}" for number in numbers)


def text(path: Path, count: int = 200, seed: int = 1) -> Path:
    """Write a text of random tokens; return its path."""
    numbers = random.Random(seed)
    path.write_text(words(*(numbers.randrange(2, VOCABULARY) for _ in range(count))), encoding="utf-8")
    return path
