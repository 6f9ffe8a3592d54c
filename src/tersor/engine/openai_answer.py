"""What does a model's last state look like to who asked for it? The body of OpenAI's embeddings."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from tersor.engine.outputs import EmbeddingRequestOutput


def embeddings(answers: Sequence[EmbeddingRequestOutput], *, model: str, as_base64: bool = False) -> dict[str, Any]:
    """Return the body that answers a request of embeddings.

    Args:
        answers: one a prompt.
        model: its name.
        as_base64: whether numbers are base64 of little-endian float32 instead of a list.
    """
    data = []
    for index, answer in enumerate(answers):
        vector = np.asarray(answer.outputs.embedding, dtype="<f4")
        shown: Any = base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    tokens = sum(len(answer.prompt_token_ids) for answer in answers)
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
