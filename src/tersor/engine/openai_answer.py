"""What does a model's last state look like to who asked for it? The body of OpenAI's embeddings."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.engine.openai_body import Ask


@dataclass(frozen=True, slots=True)
class Embedded:
    """The last state of a prompt.

    Attributes:
        request_id: as it was given.
        prompt_tokens: how many tokens it has.
        vector: float32 [hidden].
        error: why the request failed, or `None`.
    """

    request_id: str
    prompt_tokens: int
    vector: Sequence[float] | np.ndarray
    error: str | None = None


def embeddings(ask: Ask, answers: Sequence[Embedded], *, model: str) -> dict[str, Any]:
    """Return the body that answers a request of embeddings, one answer a prompt."""
    data = []
    for index, answer in enumerate(answers):
        vector = np.asarray(answer.vector, dtype="<f4")
        shown: Any = base64.b64encode(vector.tobytes()).decode() if ask.base64 else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    tokens = sum(answer.prompt_tokens for answer in answers)
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
