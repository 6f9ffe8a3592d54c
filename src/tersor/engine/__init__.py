"""Which token comes next? Generation over a static cache, with the decode step as a CUDA graph on a GPU."""

from __future__ import annotations

from tersor.engine.generate import Generator, Statistics, TextStream, chat_prompt, stream
from tersor.engine.sampling import Sampling

__all__ = ["Generator", "Sampling", "Statistics", "TextStream", "chat_prompt", "stream"]
