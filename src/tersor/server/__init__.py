"""How is a model asked over HTTP? OpenAI's API in front of any engine, with nothing lost in silence."""

from __future__ import annotations
