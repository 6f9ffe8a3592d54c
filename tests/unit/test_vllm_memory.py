"""Memory while vLLM loads: what torch got for small tensors is used again, and nothing else is changed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import packed_models, vllm_stand_in
from helpers.vllm_layers import HIDDEN, LAYER, config_of, loading

GPU = torch.device("cuda")
MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("one_vllm_rank")


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Pretend an allocator of a GPU: what it is set to, by what text, and the texts that it was set to."""
    found = SimpleNamespace(limit=20 * MIB, text="max_split_size_mb:20", backend="native", asked=[])
    words = {"max_split_size": "limit", "PYTORCH_CUDA_ALLOC_CONF": "text"}
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: found.backend)
    monkeypatch.setattr(
        torch.cuda.memory,
        "_snapshot",
        lambda: {"allocator_settings": {word: getattr(found, own) for word, own in words.items()}},
    )
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.asked.append)
    return found


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("max_split_size_mb:20", "max_split_size_mb:20,max_split_size_mb:21"),
        ("", "max_split_size_mb:21"),
        (
            "garbage_collection_threshold:0.8, max_split_size_mb:20,",
            "garbage_collection_threshold:0.8, max_split_size_mb:20,max_split_size_mb:21",
        ),
    ],
)
def test_the_limit_of_vllm_is_raised_above_a_segment_beside_all_other_settings(
    vllm: SimpleNamespace, allocator: SimpleNamespace, text: str, wanted: str
) -> None:
    from tersor.integrations.vllm import memory

    allocator.text = text
    memory.reuse_segments(GPU)
    assert allocator.asked == [wanted]


@pytest.mark.parametrize(
    ("device", "limit", "backend"),
    [
        ("cpu", 20 * MIB, "native"),
        ("cuda", -1, "native"),
        ("cuda", 128 * MIB, "native"),
        ("cuda", 20 * MIB, "cudaMallocAsync"),
    ],
)
def test_where_no_small_tensor_is_kept_from_a_segment_nothing_is_set(
    vllm: SimpleNamespace, allocator: SimpleNamespace, device: str, limit: int, backend: str
) -> None:
    from tersor.integrations.vllm import memory

    allocator.limit, allocator.backend = limit, backend
    memory.reuse_segments(torch.device(device))
    assert not allocator.asked


def test_every_kind_of_packed_layer_has_the_limit_raised_before_its_weights_come(
    tmp_path: Path, vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersor.integrations.vllm import memory

    options, changes = {"overrides": {"lm_head": "int8"}}, {"moe_intermediate_size": HIDDEN}
    packed = packed_models.case("qwen3_moe", tmp_path, options, **changes).packed
    config, seen = config_of(packed), []
    monkeypatch.setattr(memory, "reuse_segments", seen.append)
    with loading():
        vllm_stand_in.RoutedExperts(config, f"{LAYER}.mlp.experts", 4, HIDDEN, HIDDEN)
        assert seen == [torch.device("cpu")]
        vllm_stand_in.RowParallelLinear(config, f"{LAYER}.self_attn.o_proj", HIDDEN, [HIDDEN])
        assert len(seen) == 2
        vllm_stand_in.ParallelLMHead(config, "lm_head", 96, HIDDEN)
        assert len(seen) == 3
