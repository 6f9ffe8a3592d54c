"""What does vLLM load of a model without a checkpoint? Random weights, each made where it is packed, of no file.

They are those of a checkpoint of random weights, and not vLLM's own dummies: norms of a thousandth let activations
vanish.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tersor.bench import random_checkpoint
from tersor.checkpoint.source import CONFIG_NAME
from tersor.hardware import resolve_device
from tersor.integrations.vllm import memory

FORMAT = "tersor_random"
"""What vLLM is told to load."""


def register() -> None:
    """Enter the format in vLLM, in this process."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    @register_model_loader(FORMAT)
    class RandomLoader(DefaultModelLoader):  # type: ignore[misc, unused-ignore]
        """vLLM's own loader, with other tensors."""

        def download_model(self, model_config: Any) -> None:
            """Do nothing."""

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
            """Yield name and tensor."""
            config = json.loads((Path(model_config.model) / CONFIG_NAME).read_text(encoding="utf-8"))
            context, device = int(config["max_position_embeddings"]), resolve_device()
            memory.reuse_segments(device)  # drawn experts come and go by the thousand, whoever packs them
            yield from random_checkpoint.tensors(config, context, model_config.dtype, device)
