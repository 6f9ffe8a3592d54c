"""How good is it? Perplexity, divergence from a reference, tasks, and the picture of size against quality."""

from __future__ import annotations

from tersor.evaluate.compare import Comparison, compare
from tersor.evaluate.noise import RoundedInputs
from tersor.evaluate.predictors import EngineModel, engine_model
from tersor.evaluate.quality import PerWindow, Quality, evaluate
from tersor.evaluate.run import KIND, VERSION, Judge, Judgement
from tersor.evaluate.subjects import Subject, subject
from tersor.evaluate.tasks import find_tasks, run_tasks
from tersor.evaluate.windows import cut_windows, read_text

__all__ = [
    "KIND",
    "VERSION",
    "Comparison",
    "EngineModel",
    "Judge",
    "Judgement",
    "PerWindow",
    "Quality",
    "RoundedInputs",
    "Subject",
    "compare",
    "cut_windows",
    "engine_model",
    "evaluate",
    "find_tasks",
    "read_text",
    "run_tasks",
    "subject",
]
