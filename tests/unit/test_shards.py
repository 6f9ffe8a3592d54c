"""Decoders in parts: what all ranks make together is what one device makes, and each reads its own bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoders, packed_models, tiny_lm
from helpers.ranks import together

from tersor import models
from tersor.checkpoint.reader import SafetensorsFile
from tersor.errors import ShapeError
from tersor.models.weights import Shared
from tersor.ops.collective import Ranks

LONG = {"max_position_embeddings": 256}
GROUPS = {"format": "int4", "group_size": 32}
CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "llama, plain": ("llama", 2, {}, {}),
    "llama, more ranks than kv heads": ("llama", 3, {}, {}),
    "llama, one kv head in three": ("llama", 3, {}, {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "llama, kv heads uneven": (
        "llama", 2, {"format": "fp6_e3m2"},
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32},
    ),
    "llama, int4 groups uneven": ("llama", 3, GROUPS, {"head_dim": 32, "intermediate_size": 160}),
    "llama, tied and packed": (
        "llama", 3, {"format": "fp6_e3m2", "overrides": ["embed_tokens=int8:g64"]},
        {"tie_word_embeddings": True, "head_dim": 32},
    ),
    "llama, head and embedding packed": (
        "llama", 2, {"format": "fp6_e3m2", "overrides": ["lm_head=int8", "embed_tokens=fp8_e4m3"]}, {}
    ),
    "llama, one scheme a layer": (
        "llama", 2, {"format": "uint4", "group_size": 64, "overrides": [r"1\.mlp\.down_proj=fp6_e3m2", "up_proj=int8"]},
        {"intermediate_size": 192, "head_dim": 32},
    ),
    "qwen2, biases": ("qwen2", 2, {}, {}),
    "qwen2, biases, packed": ("qwen2", 2, {"format": "fp6_e3m2"}, {}),
    "phi3, joined layers": ("phi3", 2, {"format": "uint4", "group_size": 32}, {}),
    "gemma2": ("gemma2", 2, {"format": "fp6_e3m2"}, {"head_dim": 32}),
    "gemma3": ("gemma3_text", 2, {}, {}),
    "opt, biases everywhere": ("opt", 3, {"format": "fp5_e2m2"}, {"hidden_size": 128, "word_embed_proj_dim": 128}),
    "qwen3": ("qwen3", 3, {"format": "fp6_e2m3"}, {"head_dim": 32}),
    "mixtral, plain": ("mixtral", 2, {}, {}),
    "mixtral": ("mixtral", 3, {"format": "fp6_e3m2"}, {"head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", 2, GROUPS, {"moe_intermediate_size": 96, "head_dim": 32}),
    "gpt_oss, plain": ("gpt_oss", 2, {}, {}),
    "deepseek_v2, plain": ("deepseek_v2", 3, {}, {}),
    "deepseek_v3, plain": ("deepseek_v3", 2, {}, {}),
    "deepseek_v2, queries of tokens": ("deepseek_v2", 2, {}, {"q_lora_rank": None}),
    "deepseek_v2": (
        "deepseek_v2", 2, {"format": "fp6_e3m2"}, {"moe_intermediate_size": 64, "intermediate_size": 128}
    ),
    "deepseek_v3": ("deepseek_v3", 2, GROUPS, {"moe_intermediate_size": 96, "intermediate_size": 96}),
    "gpt_oss": ("gpt_oss", 3, {"format": "mxfp4_e2m1"}, {"intermediate_size": 96, "head_dim": 32}),
}  # fmt: skip


def made(case: str, folder: Path) -> tuple[Path, int]:
    """Return the checkpoint of a case, and its ranks."""
    name, ranks, options, changes = CASES[case]
    if options:
        return packed_models.case(name, folder, options, **LONG, **changes).packed, ranks
    return packed_models.plain(name, folder / "plain", **LONG, **changes), ranks


@pytest.mark.parametrize("case", CASES)
def test_logits_of_ranks_together_are_those_of_one_device(case: str, tmp_path: Path) -> None:
    path, count = made(case, tmp_path)
    whole = models.load(path, "cpu")
    given = decoders.texts(whole.config.vocabulary)
    wanted = decoders.logits(whole, given)
    largest = max(float(one.abs().max()) for one in wanted)

    def run(ranks: Ranks) -> tuple[models.Decoder, list[torch.Tensor]]:
        decoder = models.load(path, "cpu", ranks=ranks)
        return decoder, decoders.logits(decoder, given)

    found = together(count, run)
    for _, parts in found:
        for one, other, first in zip(parts, wanted, found[0][1], strict=True):
            assert float((one - other).abs().max()) < 1e-4 * largest
            assert torch.equal(one, first)  # bit for bit on every rank
    sizes = [decoder.nbytes for decoder, _ in found]
    assert max(sizes) < whole.nbytes


def test_a_rank_reads_its_own_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed_models.compressed(tiny_lm.TINY, tmp_path / "packed", format="int4", group_size=64)
    stored = packed_models.tensors(path)
    reads: list[int] = []
    read = SafetensorsFile.read_into

    def counted(self: SafetensorsFile, spec: Any, start: int, buffer: memoryview) -> None:
        reads.append(len(buffer))
        read(self, spec, start, buffer)

    monkeypatch.setattr(SafetensorsFile, "read_into", counted)
    for rank in range(2):
        models.load(path, "cpu", ranks=Ranks(rank, 2))
    norms = sum(tensor.nbytes for name, tensor in stored.items() if "norm" in name)
    assert sum(reads) == sum(tensor.nbytes for tensor in stored.values()) + norms


def test_a_model_that_cannot_be_cut_so_often_is_refused_by_the_name_of_what_is_too_small(tmp_path: Path) -> None:
    path = packed_models.case("llama", tmp_path, {"format": "int4", "group_size": 64}, intermediate_size=128).packed
    with pytest.raises(ShapeError, match=r"layers\.0\.self_attn\.o_proj.* 2 ranks"):
        models.load(path, "cpu", ranks=Ranks(0, 2))


def test_a_random_decoder_is_cut_as_a_stored_one(tmp_path: Path) -> None:
    path = packed_models.plain("llama", tmp_path / "plain")
    with_weights = models.load(path, "cpu", ranks=Ranks(1, 2))
    config = models.load(path, "cpu").config
    random = models.random_decoder(config, None, "cpu", torch.float32, ranks=Ranks(1, 2))
    assert [one.shape for one in random.tensors()] == [one.shape for one in with_weights.tensors()]
    assert isinstance(random.head, Shared) and random.head.widths == (64, 32)
