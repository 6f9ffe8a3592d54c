"""What does torch's allocator do while vLLM's workers load a model?"""

from __future__ import annotations

import torch

_SEGMENT_MB = 20
"""What torch's allocator gets from CUDA for a tensor of more than 1 and less than 10 MiB."""


def reuse_segments(device: torch.device) -> None:
    """Have torch use memory again that it got for tensors of a few MiB, while vLLM's workers load a model.

    They let its allocator split no block of 20 MiB and more meanwhile, and torch gives a smaller tensor none of those.
    A segment of 20 MiB that is free as a whole is one: experts that were packed left many of them behind, until the GPU
    was full and each allocation had to free one. A limit of 21 MiB splits none of the blocks that vLLM means. What was
    there before, vLLM puts back when it has loaded.

    Args:
        device: of the weights.
    """
    if device.type != "cuda" or torch.cuda.memory.get_allocator_backend() != "native":
        return
    found = torch.cuda.memory._snapshot()["allocator_settings"]
    if found["max_split_size"] == _SEGMENT_MB << 20:
        others = found["PYTORCH_CUDA_ALLOC_CONF"].strip(", ")  # what is not said again is forgotten; the last counts
        limit = f"max_split_size_mb:{_SEGMENT_MB + 1}"
        torch._C._accelerator_setAllocatorSettings(f"{others},{limit}" if others else limit)
