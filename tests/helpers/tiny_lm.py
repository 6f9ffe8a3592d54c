"""The bundled tiny model, loaded once a process, and a checkpoint made from it."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tersor.integrations.transformers import load

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-lm"


@functools.cache
def model() -> PreTrainedModel:
    """Return the model on the CPU; a test must not change it."""
    return load.load_model(TINY, "cpu")


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Return its tokenizer."""
    return load.load_tokenizer(TINY)


def copy(target: Path, *names: str) -> Path:
    """Copy the named files of the tiny model, all of them without names."""
    target.mkdir()
    for file in TINY.iterdir():
        if not names or file.name in names:
            shutil.copy(file, target / file.name)
    return target
