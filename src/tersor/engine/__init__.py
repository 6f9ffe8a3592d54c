"""Which request runs now, in which pages, and which token comes next?"""

from __future__ import annotations

from tersor.engine.continuation import Continuation
from tersor.engine.sampling import Sampling
from tersor.engine.text import Detokenizer, StopFilter

__all__ = ["Continuation", "Detokenizer", "Sampling", "StopFilter"]
