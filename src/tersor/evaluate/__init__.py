"""How good is it? Perplexity, divergence from a reference, and the picture of size against quality."""

from __future__ import annotations

from tersor.evaluate.predictors import EngineModel, engine_model
from tersor.evaluate.quality import Quality, evaluate
from tersor.evaluate.windows import cut_windows, read_text

__all__ = ["EngineModel", "Quality", "cut_windows", "engine_model", "evaluate", "read_text"]
