"""Torch's allocator as vLLM's workers set it while they load: small tensors get memory that was given back."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MIB = 1 << 20


@pytest.fixture
def loading() -> Iterator[None]:
    """Limit what the allocator splits as vLLM does, and give back what was there before."""
    before = torch.cuda.memory._snapshot()["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"]
    torch._C._accelerator_setAllocatorSettings("max_split_size_mb:20")
    yield
    torch._C._accelerator_setAllocatorSettings(before or f"max_split_size_mb:{(2**64 - 1) // MIB}")
    torch.cuda.empty_cache()


def test_tensors_of_some_mib_use_freed_segments_again(vllm: SimpleNamespace, loading: None) -> None:
    from tersor.integrations.vllm import memory

    device = torch.device("cuda")
    torch.empty(1, device=device)
    memory.reuse_segments(device)
    assert torch.cuda.memory._snapshot()["allocator_settings"]["max_split_size"] == 21 * MIB
    torch.cuda.empty_cache()
    begun = torch.cuda.memory_reserved()
    for _ in range(40):  # each is freed before the next
        torch.empty(6 * MIB, dtype=torch.uint8, device=device)
    assert torch.cuda.memory_reserved() - begun <= 20 * MIB


def test_a_big_block_that_is_free_is_not_split(vllm: SimpleNamespace, loading: None) -> None:
    from tersor.integrations.vllm import memory

    device = torch.device("cuda")
    torch.empty(1, device=device)
    memory.reuse_segments(device)
    torch.cuda.empty_cache()
    begun = torch.cuda.memory_reserved()
    torch.empty(256 * MIB, dtype=torch.uint8, device=device)
    kept = torch.empty(6 * MIB, dtype=torch.uint8, device=device)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - begun <= 20 * MIB
    del kept
